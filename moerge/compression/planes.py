"""Position and sign planes of ternary tensors: where values are kept, and which of them are negative.

gap8: per kept flat index, ascending, the number of values skipped; 255 skips 255 values and keeps none.
mask: one bit per value, lowest bit first. signs: one bit per kept value, 1 is negative, lowest bit first.
The position planes of all entries form one stream, cut every 262,144 bytes and deflated piece by piece.
"""

import zlib
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from moerge.compression import huffman
from moerge.compression.rules import refuse

UInt8 = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Paint = Callable[[Positions, int], None]

PIECE_BYTES = 262_144
GAP8, MASK = 0, 1
_ESCAPE = 255
# A window of gaps sums to at most 2^18 * 255 < 2^26, and its temporaries stay in the processor's cache:
# 2^18 decoded 5 to 20 % faster than 2^20, which the format allows, and 2^16.
_WINDOW = 1 << 18


def coding_for(kept: int, size: int) -> int:
    """The coding expected to be smaller: gaps while less than 0.3 of the values are kept."""
    return GAP8 if 10 * kept < 3 * size else MASK


def pack(positions: Positions, size: int, coding: int) -> UInt8:
    """Ascending flat indices below `size` as a position plane."""
    return _gaps(positions) if coding == GAP8 else _mask(positions, size)


def pack_signs(negative: Bools) -> UInt8:
    """One bit per kept value, padded with zeros to whole bytes."""
    return np.packbits(negative, bitorder="little")


def _gaps(positions: Positions) -> UInt8:
    parts = [np.empty(0, np.uint8)]
    previous = -1
    for start in range(0, positions.size, _WINDOW):
        window = positions[start : start + _WINDOW]
        gaps = np.empty(window.size, np.int64)
        gaps[0] = window[0] - previous
        np.subtract(window[1:], window[:-1], out=gaps[1:])
        gaps -= 1
        previous = int(window[-1])
        if int(gaps.max()) < _ESCAPE:
            parts.append(gaps.astype(np.uint8))
            continue
        escapes, rest = np.divmod(gaps, _ESCAPE)
        plane = np.full(window.size + int(escapes.sum()), _ESCAPE, np.uint8)
        plane[np.cumsum(escapes + 1) - 1] = rest
        parts.append(plane)
    return np.concatenate(parts)


def _mask(positions: Positions, size: int) -> UInt8:
    bits = np.zeros(size, np.bool_)
    bits[positions] = True
    return np.packbits(bits, bitorder="little")


def deflate(piece: bytes) -> bytes:
    """Huffman-only raw deflate of one piece, or the piece itself when that is not larger.

    Matches are left out because gaps have none worth a distance code: they cost size at every zlib level.
    """
    packed = huffman.deflate(piece)
    return packed if len(packed) < len(piece) else piece


def inflate(packed: bytes, size: int, *, where: str) -> bytes:
    """One piece back to exactly `size` bytes, never inflating more than one byte beyond. Rules C5."""
    if len(packed) == size:
        return packed
    unpacker = zlib.decompressobj(-15)
    try:
        piece = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        refuse("C5.deflate", where, met=str(error), wanted="a raw deflate stream")
    if len(piece) > size or (unpacker.eof and len(piece) < size):
        refuse("C5.length", where, met=f"{len(piece)} bytes or more", wanted=f"{size} bytes")
    if not unpacker.eof:
        refuse("C5.end", where, met=f"no end after {len(piece)} bytes", wanted=f"an end after {size} bytes")
    if unpacker.unused_data or unpacker.unconsumed_tail:
        met = len(unpacker.unused_data) + len(unpacker.unconsumed_tail)
        refuse("C5.trailing", where, met=f"{met} bytes after the stream", wanted="none")
    return piece


def walk_gaps(chunks: Iterable[UInt8], *, size: int, kept: int, paint: Paint, where: str) -> None:
    """Check a gap8 plane that comes in chunks and hand its positions to `paint(positions, number of the first)`.

    Positions are checked in Python's integers before each call, because numpy takes a negative index for one from the
    end. Rules C6.
    """
    room = np.empty(_WINDOW, np.int64)
    ahead = 0  # flat index that a gap of zero would keep next
    done = 0
    last = 0
    for chunk in chunks:
        for start in range(0, chunk.size, _WINDOW):
            gaps = chunk[start : start + _WINDOW]
            steps = room[: gaps.size]
            np.add(gaps, 1, out=steps, dtype=np.int64)
            emits = gaps != _ESCAPE if int(gaps.max()) == _ESCAPE else None
            if emits is not None:
                steps[~emits] = _ESCAPE
            steps[0] += ahead - 1
            np.cumsum(steps, out=steps)
            ahead = int(steps[-1]) + 1
            last = int(gaps[-1])
            # After a final escape the next kept index is at least `ahead`, so `ahead` itself may be the size only
            # if nothing follows, which C6.escape refuses.
            if ahead > size:
                refuse("C6.position", where, met=f"position {ahead - 1}", wanted=f"below {size}")
            positions = steps if emits is None else steps[emits]
            if done + positions.size > kept:
                refuse("C6.emitted", where, met=f"{done + positions.size} or more", wanted=kept)
            paint(positions, done)
            done += positions.size
    if last == _ESCAPE:
        refuse("C6.escape", where, met="255 as its last byte", wanted="a gap")
    if done != kept:
        refuse("C6.emitted", where, met=done, wanted=kept)


def walk_mask(chunks: Iterable[UInt8], *, size: int, kept: int, paint: Paint, where: str) -> None:
    """Check a mask plane and hand its positions to `paint`, as `walk_gaps` does. Rules C4.padding and C6."""
    window = _WINDOW // 8
    first = 0
    done = 0
    for chunk in chunks:
        for start in range(0, chunk.size, window):
            bits = np.unpackbits(chunk[start : start + window], bitorder="little")
            left = size - first
            if bits.size > left and bits[left:].any():
                refuse("C4.padding", where, met="a bit beyond the last value", wanted="zeros")
            positions = np.flatnonzero(bits.view(np.bool_))
            if done + positions.size > kept:
                refuse("C6.popcount", where, met=f"{done + positions.size} or more", wanted=kept)
            positions += first
            paint(positions, done)
            done += positions.size
            first += bits.size
    if done != kept:
        refuse("C6.popcount", where, met=done, wanted=kept)
