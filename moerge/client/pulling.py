"""All files of an expert to a folder: verified first, moved in last, so that the folder never holds half of them."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from moerge import compression
from moerge.client import download, examine, staging
from moerge.client.download import Wanted
from moerge.client.errors import PathUnsafe
from moerge.client.examine import Found
from moerge.client.hub import Hub
from moerge.client.patience import Patience
from moerge.client.records import File, Snapshot
from moerge.client.references import Reference
from moerge.compression.adapters import CONFIG_FILE, WEIGHTS_FILE
from moerge.compression.manifest import Budget
from moerge.errors import EncodedInvalid
from moerge.tensors import files

ENCODED = "adapter.compeft.safetensors"
# The tensors of an encoded adapter take at most what the original takes, and its header some more.
_HEADER_BYTES = 2**24


@dataclass(frozen=True)
class Pulled:
    """What a folder now holds: decoded weights stand in `files` as they are there, not as they are on the hub.

    `kept` names files that were there already; `encoded` tells of the compressed form.
    """

    reference: Reference
    commit: str
    folder: Path
    files: tuple[File, ...]
    kept: tuple[str, ...]
    downloaded_bytes: int
    encoded: Found | None = None


def pull(
    hub: Hub,
    reference: Reference,
    out_dir: str | Path,
    *,
    compressed: bool = False,
    density: float | None = None,
    preset: str | None = None,
    only: Collection[str] | None = None,
    snapshot: Snapshot | None = None,
) -> Pulled:
    """All files of a revision in `out_dir`, or `only` these, each against its SHA-256; what lies there already is kept.

    With `compressed`, the weights come in their compressed form (`density`, `preset`; else the hub's own choice),
    are held against the rules of the format and against the config, and are decoded. Nothing appears in `out_dir`
    before all of it is there. `snapshot` is what the reference means, where the caller has asked already. Raises
    ClientError, EncodedInvalid, AdapterInvalid, ConfigInvalid, OSError.
    """
    patience = hub.patience()
    folder = Path(out_dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise PathUnsafe(
            f"{folder} is not a folder.", pointer=str(folder), met="a file", wanted="a folder, or nothing yet",
            remedy="Name another folder.",
        )  # fmt: skip
    snapshot = snapshot or hub.snapshot(reference, patience=patience)
    with staging.stage(folder) as stage:
        wanted = [
            file
            for file in snapshot.files
            if (only is None or file.path in only) and not (compressed and file.path == WEIGHTS_FILE)
        ]
        kept = tuple(file.path for file in wanted if _is_there(folder / file.path, file))
        missing = [file for file in wanted if file.path not in kept]
        for file in missing:
            fetch_file(hub, snapshot, file, stage, patience)
        count = sum(file.size for file in missing)
        found = None
        if compressed:
            place = stage / f".{ENCODED}"
            config = next((p for p in (stage / CONFIG_FILE, folder / CONFIG_FILE) if p.is_file()), None)
            found = fetch_encoded(
                hub, snapshot, place, density=density, preset=preset, config=config, patience=patience
            )
            count += place.stat().st_size
            hub.progress("decoding", None)
            decoded = compression.decompress(place, stage, budget=budget_of(snapshot))
            wanted.append(File(WEIGHTS_FILE, decoded.stat().st_size, files.sha256(decoded)))
        staging.keep_only(stage, {*(file.path for file in missing), *((WEIGHTS_FILE,) if compressed else ())})
        staging.land(stage, folder)
    return Pulled(reference, snapshot.commit, folder, tuple(wanted), kept, count, found)


def fetch_encoded(
    hub: Hub,
    snapshot: Snapshot,
    place: Path,
    *,
    density: float | None,
    preset: str | None,
    config: Path | None,
    patience: Patience,
) -> Found:
    """The compressed form of a commit at `place`, verified: its SHA-256, every rule, its source and its config."""
    params = {"revision": snapshot.commit}
    if density is not None:
        params["density"] = f"{density:.12g}"
    if preset is not None:
        params["preset"] = preset
    path = f"/api/v1/experts/{snapshot.full_name}/compressed"
    download.fetch(hub, Wanted(path, "compressed weights", params), place, patience=patience)
    found = examine.encoded(
        place, config=config.read_bytes() if config is not None else None, budget=budget_of(snapshot)
    )
    original = snapshot.file(WEIGHTS_FILE)
    source = found.facts.get("source_sha256")
    if original is not None and source != original.sha256:
        raise EncodedInvalid(
            "The compressed form was made from other weights than those of this revision.", pointer="source_sha256",
            met=str(source)[:80], wanted=original.sha256, rule="source",
            remedy="Pull without --compressed, and tell the hub's operator.",
        )  # fmt: skip
    return found


def budget_of(snapshot: Snapshot) -> Budget:
    """What decoding may take: the size of the original weights, which the compressed form claims to be."""
    original = snapshot.file(WEIGHTS_FILE)
    if original is None:
        return Budget()
    size = original.size + _HEADER_BYTES
    return Budget(file_bytes=size, values=size, output_bytes=size)


def fetch_file(hub: Hub, snapshot: Snapshot, file: File, stage: Path, patience: Patience) -> None:
    """One file of a commit below `stage`, unless it lies there already."""
    target = stage / file.path
    if _is_there(target, file):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # The commit pins what is fetched: a branch that moves meanwhile cannot mix two revisions.
    path = f"/{snapshot.full_name}/resolve/{snapshot.commit}/{quote(file.path)}"
    wanted = Wanted(path, file.path, size=file.size, sha256=file.sha256, git_sha1=file.git_sha1)
    download.fetch(hub, wanted, target, patience=patience)


def _is_there(path: Path, file: File) -> bool:
    """Whether a file lies there already, whole and unchanged."""
    is_plain = path.is_file() and not path.is_symlink()
    if not is_plain or path.stat().st_size != file.size:
        return False
    return files.sha256(path) == file.sha256 if file.sha256 else download.git_sha1(path) == file.git_sha1
