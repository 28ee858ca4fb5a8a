"""A folder that changes all at once: files gather beside it and are moved in when everything is there."""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from moerge.client.errors import FolderBusy, HubUnreachable, PathUnsafe, WaitedTooLong
from moerge.compression.adapters import WEIGHTS_FILE

# Where files gather when they cannot do so beside the folder.
INSIDE = ".pull"


@contextmanager
def stage(folder: Path, *, resumes: bool = True) -> Iterator[Path]:
    """A hidden folder where files gather, on the same disk as `folder`; alone in it, or FolderBusy.

    It is removed at the end, but stays when the network failed or the caller stopped, for the next call to go on from,
    unless that call could not: then (`resumes` is false) it is empty in the beginning and gone whatever happens.
    """
    place = _place_for_stage(folder)
    place.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise PathUnsafe(
            f"{place} belongs to somebody else.", pointer=str(place), met="a link or a foreign folder",
            wanted="a folder of your own, or nothing", remedy="Remove it, or name another folder.",
        )  # fmt: skip
    lock = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusy(
                f"Another pull or merge writes to {folder}.", pointer=str(folder), met="a command that is running",
                wanted="one at a time", remedy="Wait until it has ended, or name another folder.",
            ) from error  # fmt: skip
        if not resumes:
            keep_only(place, ())
        try:
            yield place
        except BaseException as error:
            # An empty one is of no use to the next call.
            has_files = any(path.is_file() for path in place.rglob("*"))
            if not (resumes and has_files and isinstance(error, HubUnreachable | WaitedTooLong | KeyboardInterrupt)):
                shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _place_for_stage(folder: Path) -> Path:
    """Beside the folder; inside it where nothing can be made beside it or it is a disk of its own."""
    existing = next((parent for parent in folder.parents if parent.is_dir()), folder)
    can_write = os.access(existing, os.W_OK)
    if not folder.is_dir() or (can_write and folder.stat().st_dev == existing.stat().st_dev):
        return folder.parent / f".{folder.name}.pull"
    return folder / INSIDE


def keep_only(stage: Path, paths: Collection[str]) -> None:
    """Remove what an earlier call has left in the stage and this one did not want."""
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(stage).as_posix() not in paths:
            path.unlink()


def land(stage: Path, folder: Path) -> None:
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


def put(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
