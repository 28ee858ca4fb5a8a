"""Reads a `compeft/1` file that nobody vouches for: every rule first, memory after, and never half a result."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moerge.compression import manifest, planes
from moerge.compression.manifest import Budget, Entry
from moerge.compression.planes import PIECE_BYTES, Positions, UInt8
from moerge.compression.rules import refuse
from moerge.compression.source import Disk, Memory, Source
from moerge.compression.ternary import as_float32, blank, round_scale
from moerge.errors import EncodedInvalid, HeaderInvalid
from moerge.tensors import files, header
from moerge.tensors.files import BF16, Array
from moerge.tensors.header import TensorInfo

Initial = Callable[[str], "Array | BF16"]

VERSION = "1"
_PLANES = {"manifest": "U8", "scales": "F32", "pos": "U8", "pos_len": "I64", "sign": "U8"}
_PLAIN = "plain/"


class Encoded:
    """An open `compeft/1` file whose claims have been checked (rules 1 to 4). A context manager.

    `tensor(name)` decodes one tensor from the pieces that cover it; `walk` decodes all and checks the hash at the end.
    """

    def __init__(
        self,
        source: Source,
        *,
        budget: Budget = Budget(),  # noqa: B008 - frozen record
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._source = source
        if source.size > budget.file_bytes:
            refuse("C1.size", "file", met=f"{source.size} bytes", wanted=f"at most {budget.file_bytes}")
        self._header = _read_header(source)
        self.metadata = self._header.metadata
        self.plain = tuple(sorted(name.removeprefix(_PLAIN) for name in self._header.tensors if name not in _PLANES))
        self._manifest = manifest.inflate(self._plane("manifest"))
        rows = manifest.parse(self._manifest, budget=budget, taken=frozenset(self.plain), expected=expected)
        if self._info("scales").size != len(rows):
            refuse("C3.scales", "scales", met=self._info("scales").size, wanted=len(rows))
        self._scales = self._plane("scales")
        found = manifest.entries(rows, np.frombuffer(self._scales, "<f4"))
        self.entries = {entry.name: entry for entry in found}
        self._position_bytes = sum(entry.plane_bytes for entry in found)
        self._piece_starts = self._check_pieces()
        self._check_signs(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    @property
    def file_bytes(self) -> int:
        return self._source.size

    @property
    def ternary_bytes(self) -> int:
        """Bytes of the file that stand for ternary tensors: manifest, scales, positions and signs."""
        return sum(self._info(name).end - self._info(name).start for name in _PLANES)

    def tensor(self, name: str, initial: Initial | None = None) -> Array | BF16:
        """One tensor, plain or ternary, without reading the others. Raises KeyError for an unknown name."""
        entry = self.entries.get(name)
        if entry is None:
            return self._plain_tensor(name)
        return self._decode(entry, _Pieces(self), initial)

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape that `tensor` will give."""
        entry = self.entries.get(name)
        claim = entry or self._info(_PLAIN + name)
        return claim.dtype, claim.shape

    def walk(self, initial: Initial | None = None) -> Iterator[tuple[str, Array | BF16]]:
        """Every ternary tensor in the order of the manifest; raises C7.hash after the last when the hash differs.

        Use nothing of it before it has ended.
        """
        digest = hashlib.sha256(self._manifest + self._scales)
        pieces = _Pieces(self, digest)
        for entry in self.entries.values():
            yield entry.name, self._decode(entry, pieces, initial)
        self._check_hash(digest)

    def verify(self) -> None:
        """Check rules 5 to 7 over the whole file, decoding nothing."""
        digest = hashlib.sha256(self._manifest + self._scales)
        pieces = _Pieces(self, digest)
        for entry in self.entries.values():
            _walk(entry, pieces, _paint_nothing)
        self._check_hash(digest)

    def piece(self, number: int) -> bytes:
        """One piece of the decoded position plane. Rules C5."""
        start, end = self._piece_starts[number], self._piece_starts[number + 1]
        size = min(PIECE_BYTES, self._position_bytes - number * PIECE_BYTES)
        return planes.inflate(self._plane("pos", start, end - start), size, where=f"pos piece {number}")

    def _decode(self, entry: Entry, pieces: "_Pieces", initial: Initial | None) -> Array | BF16:
        signs = self._plane("sign", entry.sign_start, (entry.kept + 7) // 8)
        scale = round_scale(np.float32(entry.scale), entry.dtype)
        if entry.init == "base":
            out = _start_of(entry, initial)
            paint = _adder(out.reshape(-1), entry, scale, np.frombuffer(signs, np.uint8))
        else:
            out = blank(entry.shape, entry.dtype, float(entry.init))
            paint = _painter(out.reshape(-1), entry, scale, np.frombuffer(signs, np.uint8))
        _walk(entry, pieces, paint)
        return BF16(out) if entry.dtype == "BF16" else out

    def _plain_tensor(self, name: str) -> Array | BF16:
        info = self._info(_PLAIN + name)
        data = self._plane(_PLAIN + name)
        values = np.frombuffer(bytearray(data), files.NUMPY[info.dtype]).reshape(info.shape)
        return BF16(values) if info.dtype == "BF16" else values

    def _info(self, name: str) -> TensorInfo:
        return self._header.tensors[name]

    def _plane(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        info = self._info(name)
        length = info.end - info.start if count is None else count
        return self._source.read(self._header.data_start + info.start + start, length)

    def _check_pieces(self) -> list[int]:
        """Start of every piece in `pos`, and the end of the last. Rules C4.pieces, C4.piece, C4.pos."""
        total = self._position_bytes
        count = -(-total // PIECE_BYTES)
        if self._info("pos_len").size != count:
            refuse("C4.pieces", "pos_len", met=self._info("pos_len").size, wanted=count)
        lengths = np.frombuffer(self._plane("pos_len"), "<i8").tolist()
        starts = [0]
        for number, length in enumerate(lengths):
            most = min(PIECE_BYTES, total - number * PIECE_BYTES)
            if not 1 <= length <= most:
                refuse("C4.piece", f"pos piece {number}", met=f"{length} bytes", wanted=f"1 to {most}")
            starts.append(starts[-1] + length)
        if starts[-1] != self._info("pos").size:
            refuse("C4.pos", "pos", met=f"{self._info('pos').size} bytes", wanted=f"{starts[-1]}")
        return starts

    def _check_signs(self, found: list[Entry]) -> None:
        wanted = sum((entry.kept + 7) // 8 for entry in found)
        if self._info("sign").size != wanted:
            refuse("C4.sign", "sign", met=f"{self._info('sign').size} bytes", wanted=wanted)
        for entry in found:
            if entry.kept % 8:
                last = self._plane("sign", entry.sign_start + entry.kept // 8, 1)[0]
                if last >> entry.kept % 8:
                    refuse("C4.padding", entry.name, met="a sign bit beyond the last value", wanted="zeros")

    def _check_hash(self, digest: "hashlib._Hash") -> None:
        size = self._info("sign").size
        for start in range(0, size, PIECE_BYTES):
            digest.update(self._plane("sign", start, min(PIECE_BYTES, size - start)))
        claimed = self.metadata.get("planes_sha256")
        if digest.hexdigest() != claimed:
            refuse("C7.hash", "planes_sha256", met=str(claimed)[:80], wanted=digest.hexdigest())


class _Pieces:
    """Slices of the decoded position plane; keeps the last piece, since neighbours share it."""

    def __init__(self, encoded: Encoded, digest: "hashlib._Hash | None" = None) -> None:
        self._encoded = encoded
        self._digest = digest
        self._number = -1
        self._piece = b""

    def chunks(self, start: int, count: int) -> Iterator[UInt8]:
        end = start + count
        while start < end:
            number, offset = divmod(start, PIECE_BYTES)
            if number != self._number:
                self._piece = self._encoded.piece(number)
                self._number = number
                if self._digest is not None:
                    self._digest.update(self._piece)
            length = min(end - start, len(self._piece) - offset)
            yield np.frombuffer(self._piece, np.uint8, length, offset)
            start += length


def open_encoded(
    data: bytes | bytearray | memoryview | str | Path,
    *,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> Encoded:
    """Open an encoded file from memory or disk and check rules 1 to 4. Raises EncodedInvalid, OSError.

    `expected` gives the shape of every ternary tensor where the adapter's config or base model tells it.
    """
    source: Source = Disk(data) if isinstance(data, str | Path) else Memory(data)
    try:
        return Encoded(source, budget=budget, expected=expected)
    except BaseException:
        source.close()
        raise


def _read_header(source: Source) -> header.Header:
    """Rules C1 but C1.size."""
    try:
        first = source.read(0, min(8, source.size))
        length = header.claimed_bytes(first, source.size, header.COMPEFT)
        parsed = header.parse(source.read(0, length), source.size, header.COMPEFT)
    except HeaderInvalid as error:
        raise EncodedInvalid(
            error.detail, pointer=error.pointer, met=error.met, wanted=error.wanted, remedy=error.remedy,
            rule="C1.header",
        ) from error  # fmt: skip
    if parsed.metadata.get("format") != "compeft":
        refuse("C1.format", "__metadata__", met=ascii(parsed.metadata.get("format"))[:80], wanted="compeft")
    if parsed.metadata.get("version") != VERSION:
        refuse("C1.version", "__metadata__", met=ascii(parsed.metadata.get("version"))[:80], wanted=VERSION)
    missing = _PLANES.keys() - parsed.tensors.keys()
    if missing:
        refuse("C1.names", min(missing), met="no such tensor", wanted=", ".join(_PLANES))
    for name, info in parsed.tensors.items():
        if name not in _PLANES:
            if not name.startswith(_PLAIN) or name == _PLAIN + "__metadata__":
                refuse("C1.names", name, met="an unknown tensor", wanted=f"{', '.join(_PLANES)} or plain/<name>")
        elif info.dtype != _PLANES[name] or len(info.shape) != 1:
            refuse("C1.types", name, met=f"{info.dtype} {list(info.shape)}", wanted=f"{_PLANES[name]} [length]")
    return parsed


def _walk(entry: Entry, pieces: _Pieces, paint: planes.Paint) -> None:
    walk = planes.walk_gaps if entry.coding == planes.GAP8 else planes.walk_mask
    chunks = pieces.chunks(entry.plane_start, entry.plane_bytes)
    walk(chunks, size=entry.size, kept=entry.kept, paint=paint, where=entry.name)


def _paint_nothing(positions: Positions, done: int) -> None:
    """Checking alone."""


def _bits(signs: UInt8, first: int, count: int) -> UInt8:
    start = first % 8
    part = signs[first // 8 : (first + count + 7) // 8]
    return np.unpackbits(part, bitorder="little")[start : start + count]


def _painter(out: Array, entry: Entry, scale: np.ndarray[Any, Any], signs: UInt8) -> planes.Paint:
    """Writes init plus or minus the scale, as bit patterns of the dtype."""
    bits = np.dtype(f"<u{out.dtype.itemsize}")
    target = out.view(bits)
    pair = np.array([scale, -scale], np.float32) + np.float32(entry.init)
    made = files.to_dtype(pair, entry.dtype)
    patterns = (made.bits if isinstance(made, BF16) else made).view(bits)
    if entry.init:

        def paint(positions: Positions, done: int) -> None:
            target[positions] = patterns[_bits(signs, done, positions.size)]

        return paint
    # Without an initial value the two differ in the sign bit alone, and a shift is twice as fast as a look-up.
    shift, plus = 8 * out.dtype.itemsize - 1, patterns[0]

    def paint_signed(positions: Positions, done: int) -> None:
        values = _bits(signs, done, positions.size).astype(bits)
        values <<= shift
        values |= plus
        target[positions] = values

    return paint_signed


def _adder(out: Array, entry: Entry, scale: np.ndarray[Any, Any], signs: UInt8) -> planes.Paint:
    """Adds plus or minus the scale to what is there, in float32, rounded once."""
    steps = np.array([scale, -scale], np.float32)

    def paint(positions: Positions, done: int) -> None:
        old = as_float32(BF16(out[positions]) if entry.dtype == "BF16" else out[positions])
        # A sum beyond the dtype's range is infinite, as in the arithmetic of any framework.
        with np.errstate(over="ignore"):
            made = files.to_dtype(old + steps[_bits(signs, done, positions.size)], entry.dtype)
        out[positions] = made.bits if isinstance(made, BF16) else made

    return paint


def _start_of(entry: Entry, initial: Initial | None) -> Array:
    """The base model's tensor in the entry's dtype, a copy."""
    if initial is None:
        raise EncodedInvalid(
            f"{entry.name} is a difference from the base model, and no base was given.", pointer=entry.name,
            met="no base model", wanted="the checkpoint it was trained from", remedy="Pass the base checkpoint.",
        )  # fmt: skip
    base = as_float32(initial(entry.name))
    if base.shape != entry.shape:
        raise EncodedInvalid(
            f"The base tensor of {entry.name} has another shape.", pointer=entry.name, met=list(base.shape),
            wanted=list(entry.shape), remedy="Pass the base checkpoint that the metadata names.",
        )  # fmt: skip
    made = files.to_dtype(base, entry.dtype)
    return (made.bits if isinstance(made, BF16) else made).copy()
