"""Statistics that come beside an adapter: header first, values last, as for its weights."""

from pathlib import Path

from moerge.errors import MoergeError
from moerge.merging import sidecar
from moerge.tensors import header
from moerge.tensors.adapters import AdapterFacts
from registry.checks import files

FILE = sidecar.FILE


def examine(statistics: Path, facts: AdapterFacts | None, *, limits: header.Limits) -> tuple[str, ...]:
    """The kinds of statistics in a file, when they fit the adapter, by the header alone; without an adapter in the
    tree only each other. Raises UploadInvalid.
    """
    found = files.read_header(FILE, statistics, limits=limits)
    try:
        sidecar.check(found, modules=facts.modules if facts else None, shapes=facts.shapes if facts else None)
        return sidecar.kinds(found)
    except MoergeError as error:
        raise files.translated(error, FILE) from error


def scan(statistics: Path) -> None:
    """Every value against what statistics can be. Raises UploadInvalid."""
    try:
        sidecar.verify(statistics)
    except MoergeError as error:
        raise files.translated(error, FILE) from error
