"""Blobs as files on a local disk: ab/cd/<sha256>, written elsewhere first, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from registry.errors import StorageUnavailable


@dataclass(frozen=True)
class LocalStorage:
    """Storage under one folder."""

    root: Path

    def place(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"{sha256!r} is not a SHA-256 digest")
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def put(self, staged: Path, sha256: str) -> None:
        target = self.place(sha256)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            try:
                staged.replace(target)
            except OSError:  # another file system: copy beside the target, then rename
                beside = target.with_name(f".{sha256}.{os.getpid()}")
                shutil.copyfile(staged, beside)
                beside.replace(target)
                staged.unlink()
            target.chmod(0o444)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StorageUnavailable(f"The storage could not take a file: {error.strerror}") from error

    def open(self, sha256: str) -> BinaryIO:
        return self.place(sha256).open("rb")

    def size(self, sha256: str) -> int:
        return self.place(sha256).stat().st_size

    def delete(self, sha256: str) -> None:
        self.place(sha256).unlink(missing_ok=True)

    def url(self, sha256: str, *, filename: str, seconds: int) -> str | None:  # noqa: ARG002 - the protocol's signature
        return None

    @contextmanager
    def as_path(self, sha256: str) -> Iterator[Path]:
        path = self.place(sha256)
        if not path.exists():
            raise FileNotFoundError(sha256)
        yield path

    def digests(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("??/??/*") if not path.name.startswith("."))
