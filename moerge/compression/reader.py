"""Reads a `compeft/1` file that nobody vouches for: every rule first, memory after, and never half a result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moerge.compression import manifest, planes
from moerge.compression.container import Container, Initial, start_of
from moerge.compression.manifest import Budget, Entry
from moerge.compression.planes import Positions, UInt8
from moerge.compression.rules import refuse
from moerge.compression.shell import Cursor, Pieces, Shell
from moerge.compression.source import Source, open_source
from moerge.compression.ternary import as_float32, blank, round_scale
from moerge.tensors import files
from moerge.tensors.files import BF16, Array

FORMAT, VERSION = "compeft", "1"
_PLANES = {"manifest": "U8", "scales": "F32", "pos": "U8", "pos_len": "I64", "sign": "U8"}


class Encoded(Container[Entry]):
    """An open `compeft/1` file whose claims have been checked (rules 1 to 4)."""

    _last_plane = "sign"

    def __init__(
        self,
        source: Source,
        *,
        budget: Budget = Budget(),  # noqa: B008 - frozen record
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(Shell(source, name=f"{FORMAT}/{VERSION}", layout=_PLANES, budget=budget))
        rows = manifest.parse(self._manifest, budget=budget, taken=frozenset(self.plain), expected=expected)
        if self._shell.info("scales").size != len(rows):
            refuse("C3.scales", "scales", met=self._shell.info("scales").size, wanted=len(rows))
        found = manifest.entries(rows, np.frombuffer(self._scales, "<f4"))
        self.entries = {entry.name: entry for entry in found}
        self._pieces = Pieces(self._shell, "pos", "pos_len", total=sum(entry.plane_bytes for entry in found))
        self._check_signs(found)

    def _decode(self, entry: Entry, cursor: Cursor, initial: Initial | None) -> Array | BF16:
        signs = np.frombuffer(self._shell.read("sign", entry.sign_start, (entry.kept + 7) // 8), np.uint8)
        scale = round_scale(np.float32(entry.scale), entry.dtype)
        if entry.init == "base":
            out = start_of(entry.name, entry.dtype, entry.shape, initial)
            paint = _adder(out.reshape(-1), entry, scale, signs)
        else:
            out = blank(entry.shape, entry.dtype, float(entry.init))
            paint = _painter(out.reshape(-1), entry, scale, signs)
        _walk(entry, cursor, paint)
        return BF16(out) if entry.dtype == "BF16" else out

    def _check(self, entry: Entry, cursor: Cursor) -> None:
        _walk(entry, cursor, _paint_nothing)

    def _check_signs(self, found: list[Entry]) -> None:
        wanted = sum((entry.kept + 7) // 8 for entry in found)
        if self._shell.info("sign").size != wanted:
            refuse("C4.sign", "sign", met=f"{self._shell.info('sign').size} bytes", wanted=wanted)
        for entry in found:
            if entry.kept % 8:
                last = self._shell.read("sign", entry.sign_start + entry.kept // 8, 1)[0]
                if last >> entry.kept % 8:
                    refuse("C4.padding", entry.name, met="a sign bit beyond the last value", wanted="zeros")


def open_encoded(
    data: bytes | bytearray | memoryview | str | Path,
    *,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> Encoded:
    """Open an encoded file from memory or disk and check rules 1 to 4. Raises EncodedInvalid, OSError.

    `expected` gives the shape of every ternary tensor where the adapter's config or base model tells it.
    """
    source = open_source(data)
    try:
        return Encoded(source, budget=budget, expected=expected)
    except BaseException:
        source.close()
        raise


def _walk(entry: Entry, cursor: Cursor, paint: planes.Paint) -> None:
    walk = planes.walk_gaps if entry.coding == planes.GAP8 else planes.walk_mask
    chunks = cursor.chunks(entry.plane_start, entry.plane_bytes)
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
