"""Stored bytes on their way out: which part of a file was asked for, and a stream of exactly that part."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from django.db.models import F

from registry import storage
from registry.checks import files
from registry.errors import Fault, HubError, RangeUnsatisfiable, StorageUnavailable
from registry.models import Blob, Expert, File

BLOCK_BYTES = 1 << 18
# Clients ask for the weights once for each download, whatever else they look at.
COUNTED = frozenset({files.WEIGHTS})
SINGLE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*")

# Text is told to be text and nothing else; whatever a browser could run is sent as bytes.
MEDIA_TYPES = {
    "json": "application/json",
    "md": "text/plain; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "yaml": "text/plain; charset=utf-8",
    "yml": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop`, the latter not included."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Download:
    """An open blob, standing at the first byte that is to be sent."""

    stream: BinaryIO
    part: ByteRange
    size_bytes: int  # of the whole file
    is_partial: bool

    def __iter__(self) -> Iterator[bytes]:
        """The bytes of the part and no more."""
        left = self.part.length
        while left > 0 and (block := self.stream.read(min(BLOCK_BYTES, left))):
            left -= len(block)
            yield block

    def close(self) -> None:
        self.stream.close()


def parse_range(header: str | None, size_bytes: int) -> ByteRange | None:
    """The one range that a Range header asks for; None when the whole file is to be sent.

    Several ranges, other units and nonsense are answered with the whole file, as RFC 9110 section 14.2 allows.
    Raises RangeUnsatisfiable for a range past the end.
    """
    match = SINGLE_RANGE.fullmatch(header or "")
    if match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start = int(first)
        stop = min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= stop:
        raise RangeUnsatisfiable(
            f"The file has {size_bytes} bytes.",
            size_bytes=size_bytes,
            faults=[Fault("Range", header, f"a range that starts below {size_bytes}", "Ask for bytes that exist.")],
        )
    return ByteRange(start, stop)


def open(file: File, *, byte_range: ByteRange | None = None) -> Download:  # noqa: A001 - downloads.open reads well
    """A file of a revision, whole or one part of it."""
    return open_blob(file.blob, byte_range=byte_range)


def open_blob(blob: Blob, *, byte_range: ByteRange | None = None) -> Download:
    """Stored bytes, whole or one part of them. Raises StorageUnavailable."""
    part = byte_range or ByteRange(0, blob.size_bytes)
    try:
        stream = storage.current().open(blob.sha256)
    except FileNotFoundError as error:
        # The row says that the bytes are there: this is damage, which `verify_blobs` finds, not an unknown file.
        raise HubError(f"The bytes of {blob.sha256} are missing from the storage.") from error
    except OSError as error:
        raise StorageUnavailable(f"The storage could not open a file: {error.strerror}") from error
    stream.seek(part.start)
    return Download(stream, part, blob.size_bytes, byte_range is not None)


def media_type(path: str) -> str:
    """What to call the bytes of a path, never something that a browser would run."""
    return MEDIA_TYPES.get(path.rpartition(".")[2].lower(), "application/octet-stream")


def count(file: File) -> None:
    """Count a download of an expert: called when the start of a file is sent, it counts for the weights."""
    if file.path in COUNTED and file.revision.expert_id is not None:
        Expert.objects.filter(pk=file.revision.expert_id).update(downloads=F("downloads") + 1)
