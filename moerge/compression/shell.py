"""What the containers share: a strict safetensors shell around byte planes, and planes cut into deflated pieces."""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from moerge.compression import planes
from moerge.compression.manifest import Budget
from moerge.compression.planes import PIECE_BYTES, UInt8
from moerge.compression.rules import refuse
from moerge.compression.source import Source
from moerge.errors import EncodedInvalid, HeaderInvalid
from moerge.tensors import files, header
from moerge.tensors.files import BF16, Array
from moerge.tensors.header import TensorInfo

PLAIN = "plain/"


class Shell:
    """An open file whose safetensors header has been checked (rules C1): its metadata, planes and plain tensors.

    `layout` gives the dtype of every plane by name; all have one dimension. Everything else is `plain/<name>`.
    """

    def __init__(self, source: Source, *, name: str, layout: Mapping[str, str], budget: Budget) -> None:
        self._source = source
        self._layout = layout
        if source.size > budget.file_bytes:
            refuse("C1.size", "file", met=f"{source.size} bytes", wanted=f"at most {budget.file_bytes}")
        self._header = _header(source)
        self.metadata = self._header.metadata
        self._check_names(name)
        self.plain = tuple(sorted(name.removeprefix(PLAIN) for name in self._header.tensors if name not in layout))

    def close(self) -> None:
        self._source.close()

    @property
    def file_bytes(self) -> int:
        return self._source.size

    @property
    def plane_bytes(self) -> int:
        """Bytes of all planes together: what of the file stands for encoded tensors."""
        return sum(self.info(name).end - self.info(name).start for name in self._layout)

    def info(self, name: str) -> TensorInfo:
        return self._header.tensors[name]

    def read(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        """`count` bytes of a plane from its byte `start`, all by default."""
        info = self.info(name)
        length = info.end - info.start if count is None else count
        return self._source.read(self._header.data_start + info.start + start, length)

    def plain_claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a plain tensor. Raises KeyError."""
        info = self.info(PLAIN + name)
        return info.dtype, info.shape

    def plain_tensor(self, name: str) -> Array | BF16:
        """A tensor that was kept as it is. Raises KeyError."""
        info = self.info(PLAIN + name)
        values = np.frombuffer(bytearray(self.read(PLAIN + name)), files.NUMPY[info.dtype]).reshape(info.shape)
        return BF16(values) if info.dtype == "BF16" else values

    def check_hash(self, digest: "hashlib._Hash", last_plane: str | None = None) -> None:
        """Rule C7, after `last_plane`, the one that is stored as it is, has joined the digest."""
        size = self.info(last_plane).size if last_plane else 0
        for start in range(0, size, PIECE_BYTES):
            digest.update(self.read(last_plane or "", start, min(PIECE_BYTES, size - start)))
        claimed = self.metadata.get("planes_sha256")
        if digest.hexdigest() != claimed:
            refuse("C7.hash", "planes_sha256", met=str(claimed)[:80], wanted=digest.hexdigest())

    def _check_names(self, name: str) -> None:
        kind, version = name.split("/")
        if self.metadata.get("format") != kind:
            refuse("C1.format", "__metadata__", met=ascii(self.metadata.get("format"))[:80], wanted=kind)
        if self.metadata.get("version") != version:
            refuse("C1.version", "__metadata__", met=ascii(self.metadata.get("version"))[:80], wanted=version)
        missing = self._layout.keys() - self._header.tensors.keys()
        if missing:
            refuse("C1.names", min(missing), met="no such tensor", wanted=", ".join(self._layout))
        for found, info in self._header.tensors.items():
            if found not in self._layout:
                if not found.startswith(PLAIN) or found == PLAIN + "__metadata__":
                    wanted = f"{', '.join(self._layout)} or plain/<name>"
                    refuse("C1.names", found, met="an unknown tensor", wanted=wanted)
            elif info.dtype != self._layout[found] or len(info.shape) != 1:
                wanted = f"{self._layout[found]} [length]"
                refuse("C1.types", found, met=f"{info.dtype} {list(info.shape)}", wanted=wanted)


class Pieces:
    """A plane that lies in the file as deflated pieces; `lengths` tells where each ends. Rules C4.pieces to C4.pos."""

    def __init__(self, shell: Shell, plane: str, lengths: str, *, total: int) -> None:
        self._shell, self._plane, self._total = shell, plane, total
        count = -(-total // PIECE_BYTES)
        if shell.info(lengths).size != count:
            refuse("C4.pieces", lengths, met=shell.info(lengths).size, wanted=count)
        self._starts = [0]
        for number, length in enumerate(np.frombuffer(shell.read(lengths), "<i8").tolist()):
            most = min(PIECE_BYTES, total - number * PIECE_BYTES)
            if not 1 <= length <= most:
                refuse("C4.piece", f"{plane} piece {number}", met=f"{length} bytes", wanted=f"1 to {most}")
            self._starts.append(self._starts[-1] + length)
        if self._starts[-1] != shell.info(plane).size:
            refuse("C4.pos", plane, met=f"{shell.info(plane).size} bytes", wanted=f"{self._starts[-1]}")

    def piece(self, number: int) -> bytes:
        """One piece of the decoded plane. Rules C5."""
        start, end = self._starts[number], self._starts[number + 1]
        size = min(PIECE_BYTES, self._total - number * PIECE_BYTES)
        packed = self._shell.read(self._plane, start, end - start)
        return planes.inflate(packed, size, where=f"{self._plane} piece {number}")


class Cursor:
    """Slices of a decoded plane; keeps the last piece, since neighbours share it. `digest` hears every piece once."""

    def __init__(self, pieces: Pieces, digest: "hashlib._Hash | None" = None) -> None:
        self._pieces = pieces
        self._digest = digest
        self._number = -1
        self._piece = b""

    def chunks(self, start: int, count: int) -> Iterator[UInt8]:
        """Bytes `start` to `start + count` in pieces."""
        end = start + count
        while start < end:
            number, offset = divmod(start, PIECE_BYTES)
            if number != self._number:
                self._piece = self._pieces.piece(number)
                self._number = number
                if self._digest is not None:
                    self._digest.update(self._piece)
            length = min(end - start, len(self._piece) - offset)
            yield np.frombuffer(self._piece, np.uint8, length, offset)
            start += length


def format_of(source: Source) -> str:
    """What the metadata call the container, unchecked. Rule C1.header."""
    return _header(source).metadata.get("format", "")


def _header(source: Source) -> header.Header:
    """Rule C1.header."""
    try:
        first = source.read(0, min(8, source.size))
        length = header.claimed_bytes(first, source.size, header.COMPEFT)
        return header.parse(source.read(0, length), source.size, header.COMPEFT)
    except HeaderInvalid as error:
        raise EncodedInvalid(
            error.detail, pointer=error.pointer, met=error.met, wanted=error.wanted, remedy=error.remedy,
            rule="C1.header",
        ) from error  # fmt: skip
