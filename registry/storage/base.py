"""Where blobs are kept. Names are SHA-256 digests; bytes behind a name never change."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """What a storage must do. A missing blob is FileNotFoundError; any other failure is StorageUnavailable."""

    def put(self, staged: Path, sha256: str) -> None:
        """Make the bytes of the local file `staged` durable under `sha256`, then remove `staged`."""
        ...

    def open(self, sha256: str) -> BinaryIO:
        """The bytes, seekable."""
        ...

    def size(self, sha256: str) -> int: ...

    def delete(self, sha256: str) -> None:
        """Remove the bytes; absent is fine."""
        ...

    def url(self, sha256: str, *, filename: str, seconds: int) -> str | None:
        """A link by which a client may fetch the bytes itself, or None when the hub must send them."""
        ...

    def as_path(self, sha256: str) -> AbstractContextManager[Path]:
        """The bytes as a local file for as long as the context lasts, for work that maps files into memory."""
        ...

    def digests(self) -> "list[str]":
        """Every digest that is stored, for `verify_blobs`."""
        ...
