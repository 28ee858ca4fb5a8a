"""Where an encoded file is read from: bytes in memory, or a file on disk, piece by piece."""

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moerge.compression.rules import refuse


class Source(Protocol):
    """`read` gives exactly the bytes asked for, or refuses with C1.size."""

    size: int

    def read(self, start: int, count: int) -> bytes: ...

    def close(self) -> None: ...


class Memory:
    """Bytes that are already here."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data).cast("B")
        self.size = len(self._view)

    def read(self, start: int, count: int) -> bytes:
        return bytes(self._view[start : start + count])

    def close(self) -> None:
        self._view.release()


class Disk:
    """A file, read with pread: a mapped file that becomes shorter would kill the process."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, start: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, start)
        while len(data) < count:
            # Linux returns at most 2 GiB at once.
            more = os.pread(self._descriptor, count - len(data), start + len(data))
            if not more:
                refuse("C1.size", "file", met=f"the end at byte {start + len(data)}", wanted=f"{count} bytes")
            data += more
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_source(data: bytes | bytearray | memoryview | str | Path) -> Source:
    """Bytes as they are, or the file at a path. Raises OSError."""
    return Disk(data) if isinstance(data, str | Path) else Memory(data)
