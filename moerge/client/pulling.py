"""All files of an expert to a folder: verified first, moved in last, so that the folder never holds half of them."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from moerge import compression
from moerge.client import download, examine
from moerge.client.download import Wanted
from moerge.client.errors import FolderBusy, HubUnreachable, PathUnsafe, WaitedTooLong
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
) -> Pulled:
    """All files of a revision in `out_dir`, each against its SHA-256; what lies there already is kept.

    With `compressed`, the weights come in their compressed form (`density`, `preset`; else the hub's own choice),
    are held against the rules of the format and against the config, and are decoded. Nothing appears in `out_dir`
    before all of it is there. Raises ClientError, EncodedInvalid, AdapterInvalid, ConfigInvalid, OSError.
    """
    patience = hub.patience()
    folder = Path(out_dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise PathUnsafe(
            f"{folder} is not a folder.", pointer=str(folder), met="a file", wanted="a folder, or nothing yet",
            remedy="Name another folder.",
        )  # fmt: skip
    snapshot = hub.snapshot(reference, patience=patience)
    with _stage(folder) as stage:
        wanted = [file for file in snapshot.files if not (compressed and file.path == WEIGHTS_FILE)]
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
        _keep_only(stage, {*(file.path for file in missing), *((WEIGHTS_FILE,) if compressed else ())})
        _land(stage, folder)
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


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """A hidden folder where files gather, on the same disk as `folder`; alone in it, or FolderBusy.

    It is removed at the end, but stays when the network failed or the caller stopped, for the next call to go on from.
    """
    stage = _place_for_stage(folder)
    stage.mkdir(parents=True, exist_ok=True)
    if stage.is_symlink() or stage.stat().st_uid != os.getuid():
        raise PathUnsafe(
            f"{stage} belongs to somebody else.", pointer=str(stage), met="a link or a foreign folder",
            wanted="a folder of your own, or nothing", remedy="Remove it, or name another folder.",
        )  # fmt: skip
    lock = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusy(
                f"Another pull writes to {folder}.", pointer=str(folder), met="a pull that is running",
                wanted="one at a time", remedy="Wait until it has ended, or name another folder.",
            ) from error  # fmt: skip
        try:
            yield stage
        except (HubUnreachable, WaitedTooLong, KeyboardInterrupt):
            # An empty one is of no use to the next call.
            _remove_if_empty(stage)
            raise
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(lock)


def _place_for_stage(folder: Path) -> Path:
    """Beside the folder; inside it where nothing can be made beside it or it is a disk of its own."""
    existing = next((parent for parent in folder.parents if parent.is_dir()), folder)
    can_write = os.access(existing, os.W_OK)
    if not folder.is_dir() or (can_write and folder.stat().st_dev == existing.stat().st_dev):
        return folder.parent / f".{folder.name}.pull"
    return folder / ".pull"


def _remove_if_empty(stage: Path) -> None:
    if not any(path.is_file() for path in stage.rglob("*")):
        shutil.rmtree(stage, ignore_errors=True)


def _keep_only(stage: Path, paths: set[str]) -> None:
    """Remove what an earlier call has left in the stage and this one did not want."""
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(stage).as_posix() not in paths:
            path.unlink()


def _land(stage: Path, folder: Path) -> None:
    """Move all files of the stage into the folder: at once when it is new, else one by one, the weights last."""
    if not folder.exists() and not folder.is_symlink():
        stage.rename(folder)
        return
    paths = sorted(
        (path for path in stage.rglob("*") if path.is_file()), key=lambda path: (path.name == WEIGHTS_FILE, path)
    )
    targets = [folder / path.relative_to(stage) for path in paths]
    for target in targets:
        _check_target(folder, target)
    for path, target in zip(paths, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _check_target(folder: Path, target: Path) -> None:
    """Nothing on the way may lead out of the folder: a link in it could. Raises PathUnsafe."""
    inside = folder.resolve()
    parent = target.parent.resolve()
    if parent != inside and inside not in parent.parents:
        raise PathUnsafe(
            f"{target} would be written outside {folder}.", pointer=str(target), met=str(parent), wanted=str(inside),
            remedy="Remove the link in the folder, or pull into an empty one.",
        )  # fmt: skip
    if target.is_dir():
        raise PathUnsafe(
            f"{target} is a folder, and a file of the expert has its name.", pointer=str(target), met="a folder",
            wanted="a file or nothing", remedy="Pull into an empty folder.",
        )  # fmt: skip
