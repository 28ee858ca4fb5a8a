"""An expert on a hub against its own claims: every file, config and weights together, the compressed form."""

from dataclasses import dataclass, replace
from pathlib import Path

from moerge.client import examine, pulling
from moerge.client.errors import Conflict, NotFound
from moerge.client.examine import Found
from moerge.client.hub import Hub
from moerge.client.records import File, Snapshot
from moerge.client.references import Reference
from moerge.compression.adapters import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Verified:
    """A commit whose every claim held."""

    reference: Reference
    commit: str
    found: tuple[Found, ...]


def verify(hub: Hub, reference: Reference, work: Path) -> Verified:
    """Fetch all of a revision into the empty folder `work` and check it.

    Raises DownloadDamaged, HeaderInvalid, ConfigInvalid, AdapterInvalid, EncodedInvalid at the first claim that does
    not hold, and what asking raises.
    """
    patience = hub.patience()
    snapshot = hub.snapshot(reference, patience=patience)
    found = []
    for file in snapshot.files:
        pulling.fetch_file(hub, snapshot, file, work, patience)
        found.append(Found(file.path, "file", (_line(file),)))
    has_adapter = snapshot.file(CONFIG_FILE) is not None and snapshot.file(WEIGHTS_FILE) is not None
    if has_adapter:
        found.append(replace(examine.adapter(work), name="adapter"))
        found.append(_compressed(hub, snapshot, work))
    return Verified(reference, snapshot.commit, tuple(found))


def _compressed(hub: Hub, snapshot: Snapshot, work: Path) -> Found:
    """The hub's own compressed form; where it has none, that is what was found."""
    try:
        made = pulling.fetch_encoded(
            hub,
            snapshot,
            work / pulling.ENCODED,
            density=None,
            preset=None,
            config=work / CONFIG_FILE,
            patience=hub.patience(),
        )
    except (NotFound, Conflict) as error:
        return Found("compressed form", "encoded", (), warnings=(error.detail,))
    size = made.facts["file_bytes"]
    checks = (f"{size:,} bytes, SHA-256 {made.facts['sha256'][:12]}…", *made.checks, "made from these weights")
    return Found("compressed form", "encoded", checks, made.facts)


def _line(file: File) -> str:
    kind, digest = ("SHA-256", file.sha256) if file.sha256 else ("git SHA-1", file.git_sha1)
    return f"{file.size:,} bytes, {kind} {(digest or '')[:12]}…"
