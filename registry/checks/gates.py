"""Token-level gates that come beside an adapter: header first, values last, as for its weights."""

from pathlib import Path

from moerge.errors import MoergeError
from moerge.routing import gates
from moerge.routing.gates import About
from moerge.tensors import header
from moerge.tensors.adapters import AdapterFacts
from registry.checks import files

FILE = gates.FILE


def examine(path: Path, facts: AdapterFacts | None, *, limits: header.Limits) -> tuple[About, int]:
    """How the gates were trained and how many there are, when they fit the adapter, by the header alone; without an
    adapter in the tree only what can be said without. Raises UploadInvalid.
    """
    found = files.read_header(FILE, path, limits=limits)
    try:
        return gates.check(found, shapes=facts.shapes if facts else None), len(found.tensors)
    except MoergeError as error:
        raise files.translated(error, FILE) from error


def scan(path: Path) -> None:
    """Every value: finite, and no gate zero. Raises UploadInvalid."""
    try:
        gates.verify(path)
    except MoergeError as error:
        raise files.translated(error, FILE) from error
