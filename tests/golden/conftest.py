"""Finds the folders of golden cases and hands each test module the cases of its family.

A family is a folder with an `index.json` whose `cases` is a non-empty list. `--golden-dir` names a folder that holds
`compeft/` and `merging/`, or one such folder. Without the option the copies in `data/` are used.

A test module takes part by asking for the argument `golden` and naming its family and its items:

    FAMILY = "merging"
    def items(case): return [("float32", ...), ("float64", ...)]     # optional: (suffix of the id, value of `variant`)
    def test_x(golden, variant): golden.folder, golden.case
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
FAMILIES = ("compeft", "merging")


@dataclass(frozen=True)
class Golden:
    """One case of an index, and the folder that holds its arrays."""

    folder: Path
    index: dict
    case: dict


def pytest_ignore_collect(collection_path, config):
    """A family that the given folder does not hold is not collected: no items is more honest than skipped ones."""
    family = collection_path.stem.removeprefix("test_")
    if collection_path.suffix == ".py" and family in FAMILIES and family not in _folders(config):
        return True
    return None


def pytest_generate_tests(metafunc):
    if "golden" not in metafunc.fixturenames:
        return
    folder = _folders(metafunc.config)[metafunc.module.FAMILY]
    index = _index(folder)
    variants = getattr(metafunc.module, "items", None)
    rows, ids = [], []
    for number, case in enumerate(index["cases"]):
        name = str(case.get("id") or case.get("name") or f"case{number}")
        for suffix, variant in variants(case) if variants else [("", None)]:
            golden = Golden(folder=folder, index=index, case=case)
            rows.append((golden, variant) if variants else (golden,))
            ids.append(f"{name}-{suffix}" if suffix else name)
    metafunc.parametrize(("golden", "variant") if variants else ("golden",), rows, ids=ids)


def _folders(config):
    """Family -> folder. Raises UsageError when the given folder holds no family."""
    given = config.getoption("--golden-dir")
    top = DATA if given is None else given.expanduser()
    if (top / "index.json").is_file():
        return {_family_of(_index(top)): top}
    found = {family: top / family for family in FAMILIES if (top / family).is_dir()}
    if not found:
        raise pytest.UsageError(f"{top}: no index.json, and no folder {' or '.join(FAMILIES)}")
    for folder in found.values():
        _index(folder)
    return found


def _family_of(index):
    return "compeft" if "k_percent" in index["cases"][0] else "merging"


def _index(folder):
    """Read an index. An index that is missing, unreadable or empty is an error, never a run without tests."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{path}: {error}") from error
    cases = index.get("cases") if isinstance(index, dict) else None
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise pytest.UsageError(f"{path}: wanted a non-empty list of cases")
    return index
