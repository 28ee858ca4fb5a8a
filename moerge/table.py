"""Find the implementations in a folder: one file is one member, and its SPEC carries the file's name."""

import importlib
import pkgutil
from types import ModuleType


def load(package: ModuleType) -> dict[str, ModuleType]:
    """Import every module of `package` and return name -> module, sorted by name.

    Raises ImportError when a file has no SPEC or its SPEC.name is not the file's name.
    """
    members = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        name = getattr(getattr(module, "SPEC", None), "name", None)
        if name != info.name:
            raise ImportError(f"{module.__name__}: SPEC.name is {name!r}, wanted {info.name!r}")
        members[info.name] = module
    return members
