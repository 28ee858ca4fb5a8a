"""Exact thresholds for "the k largest magnitudes" over deltas that never lie in memory as a whole.

A sample brackets the threshold, one pass counts what lies above the bracket and gathers what lies inside, and the
exact value is found there. When the sample misled, a radix histogram over the bits of the magnitudes finds it in a
few passes of bounded memory, whatever the values are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.compiled import Kernels
from moerge.merging.sources import Block, Stream, run_all

Array = npt.NDArray[Any]
Pieces = Callable[[], Iterator[tuple[int, Array]]]

SAMPLE_VALUES = 1 << 18
# Up to this many values the magnitudes are simply gathered: 8 MiB.
DIRECT_VALUES = 1 << 21
# Half-width of the bracket as a share of all values. A sample of 2^18 independent values would need a tenth of it; a
# sample of rows and columns of a low-rank product is far from independent.
BRACKET = 0.015
_DIGIT_BITS = 16


@dataclass(frozen=True)
class Cut:
    """Keep magnitudes above `threshold`, and those equal to it up to flat index `last` of the tensor."""

    threshold: float
    last: int

    def mask(self, values: Array, offset: int) -> npt.NDArray[np.bool_]:
        """Which of a block's values survive, (values,)."""
        magnitudes = np.abs(values)
        reach = self.reach(offset, values.size)
        if reach == values.size:
            return magnitudes >= self.threshold
        mask = magnitudes > self.threshold
        mask[:reach] |= magnitudes[:reach] == self.threshold
        return mask

    def reach(self, offset: int, size: int) -> int:
        """How many values of a block come before those of which an equal one no longer survives."""
        return min(max(self.last + 1 - offset, 0), size)


EVERYTHING = Cut(0.0, np.iinfo(np.int64).max)
NOTHING = Cut(np.inf, -1)
Cuts = dict[tuple[int, str], Cut]


def cuts(stream: Stream, *, density: float, scope: str, minimum: int = 1, release: bool = False) -> Cuts:
    """The cut of every expert and tensor that keeps its `density`, ranking per tensor or over a whole expert.

    `release` keeps one more value and everything equal to it, as the published code of TIES does.
    """
    groups = []
    for expert, source in enumerate(stream.sources):
        names = [name for name in stream.names if name in source.tensors]
        groups += [(expert, names)] if scope == "global" else [(expert, [name]) for name in names]

    def one(group: tuple[int, list[str]]) -> Cuts:
        expert, names = group
        size = sum(stream.size(name) for name in names)
        kept = parts.count_kept(density, size, minimum=minimum)
        return _group_cuts(stream, expert, names, min(size, kept + 1) if release else kept, release=release)

    found: Cuts = {}
    for part in run_all(one, groups, threads=stream.threads):
        found.update(part)
    return found


def cuts_at(stream: Stream, counts: Mapping[str, int]) -> Cuts:
    """The cuts that keep exactly the given number of values of each tensor in every expert."""
    found: Cuts = {}
    for expert, source in enumerate(stream.sources):
        for name in stream.names:
            if name in source.tensors:
                found.update(_group_cuts(stream, expert, [name], counts[name], release=False))
    return found


def trim(block: Block, found: Cuts) -> Array:
    """The block with everything below the cuts set to zero, (experts, values)."""
    trimmed = np.zeros_like(block.values)
    for row, member in enumerate(block.members):
        cut = found.get((member, block.name))
        if cut is not None:
            # Multiplying by the mask takes a tenth of the time of copying where it is true.
            np.multiply(block.values[row], cut.mask(block.values[row], block.offset), out=trimmed[row])
    return trimmed


def _group_cuts(stream: Stream, expert: int, names: list[str], kept: int, *, release: bool) -> Cuts:
    """Cuts of tensors that are ranked together, flattened in sorted-name order."""
    starts: dict[str, int] = {}
    size = 0
    for name in names:
        starts[name] = size
        size += stream.size(name)
    if kept >= size:
        return {(expert, name): EVERYTHING for name in names}
    if kept <= 0:
        return {(expert, name): NOTHING for name in names}

    def pieces() -> Iterator[tuple[int, Array]]:
        for name in names:
            for offset, values in stream.blocks(name, expert):
                yield starts[name] + offset, values

    def sample() -> Array:
        return np.concatenate(
            [stream.sample(name, expert, max(64, SAMPLE_VALUES * stream.size(name) // size)) for name in names]
        )

    threshold, last = find(pieces, size=size, kept=kept, sample=sample, kernels=stream.kernels)
    if release:
        last = size
    return {(expert, name): Cut(threshold, last - starts[name]) for name in names}


def find(
    pieces: Pieces, *, size: int, kept: int, sample: Callable[[], Array], kernels: Kernels | None = None
) -> tuple[float, int]:
    """Threshold and last flat index at it, such that exactly `kept` of `size` magnitudes survive, 0 < kept < size.

    `pieces` gives the values anew at each call, in flat order.
    """
    if size <= DIRECT_VALUES:
        magnitudes = np.concatenate([np.abs(values) for _, values in pieces()])
        threshold = np.partition(magnitudes, size - kept)[size - kept]
        above = int(np.count_nonzero(magnitudes > threshold))
        return float(threshold), int(np.flatnonzero(magnitudes == threshold)[kept - above - 1])
    found = _find_in_bracket(pieces, kept=kept, size=size, sample=np.abs(sample()), kernels=kernels)
    return _find_by_digits(pieces, kept=kept) if found is None else found


def _find_in_bracket(
    pieces: Pieces, *, kept: int, size: int, sample: Array, kernels: Kernels | None
) -> tuple[float, int] | None:
    """As `find`, in one pass, or None when the sample put the bracket in the wrong place or made it too wide."""
    share = 1 - kept / size
    low, high = np.quantile(sample, [max(0.0, share - BRACKET), min(1.0, share + BRACKET)], method="nearest")
    if share + BRACKET >= 1.0:
        high = sample.dtype.type(np.inf)
    above, inside, places, room = 0, [], [], 8 * BRACKET * size + DIRECT_VALUES
    for offset, values in pieces():
        over, magnitudes, found = _within(values, low, high) if kernels is None else _gather(kernels, values, low, high)
        above += over
        inside.append(magnitudes)
        places.append(found + offset)
        room -= found.size
        if room < 0:
            return None
    wanted = kept - above
    magnitudes = np.concatenate(inside)
    if not 0 < wanted <= magnitudes.size:
        return None
    threshold = np.partition(magnitudes, magnitudes.size - wanted)[magnitudes.size - wanted]
    wanted -= int(np.count_nonzero(magnitudes > threshold))
    return float(threshold), int(np.concatenate(places)[magnitudes == threshold][wanted - 1])


def _within(values: Array, low: Array, high: Array) -> tuple[int, Array, npt.NDArray[np.int64]]:
    """How many magnitudes lie above `high`, and those from `low` to `high` with their places."""
    magnitudes = np.abs(values)
    over = magnitudes > high
    found = np.flatnonzero((magnitudes >= low) ^ over)
    return int(np.count_nonzero(over)), magnitudes[found], found


def _gather(kernels: Kernels, values: Array, low: Array, high: Array) -> tuple[int, Array, npt.NDArray[np.int64]]:
    places = np.empty(values.size + 1, np.int64)
    over, count = kernels.gather(values, low.astype(values.dtype), high.astype(values.dtype), places)
    found = places[:count].copy()
    return over, np.abs(values[found]), found


def _find_by_digits(pieces: Pieces, *, kept: int) -> tuple[float, int]:
    """As `find`, by a histogram of 16 bits of the magnitudes at a time: non-negative floats order as their bits do."""
    prefix, known, wanted = 0, 0, kept
    width, unsigned, floating = 0, np.dtype(np.uint32), np.dtype(np.float32)
    while known == 0 or known < width:
        counts = np.zeros(1 << _DIGIT_BITS, dtype=np.int64)
        for _, values in pieces():
            if width == 0:
                width, floating = 8 * values.dtype.itemsize, values.dtype
                unsigned = np.dtype(f"u{values.dtype.itemsize}")
            bits = np.abs(values).view(unsigned)
            if known:
                bits = bits[bits >> unsigned.type(width - known) == unsigned.type(prefix)]
            digits = (bits >> unsigned.type(width - known - _DIGIT_BITS)) & unsigned.type((1 << _DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.intp), minlength=1 << _DIGIT_BITS)
        from_top = np.cumsum(counts[::-1])
        step = int(np.searchsorted(from_top, wanted))
        digit = (1 << _DIGIT_BITS) - 1 - step
        wanted -= int(from_top[step] - counts[digit])
        prefix, known = (prefix << _DIGIT_BITS) | digit, known + _DIGIT_BITS
    threshold = np.array([prefix], dtype=unsigned).view(floating)[0]
    return float(threshold), _place(pieces, threshold, wanted)


def _place(pieces: Pieces, threshold: np.floating[Any], wanted: int) -> int:
    """Flat index of the `wanted`-th magnitude that equals the threshold."""
    for offset, values in pieces():
        ties = np.flatnonzero(np.abs(values) == threshold)
        if wanted <= ties.size:
            return int(ties[wanted - 1]) + offset
        wanted -= ties.size
    raise AssertionError("the histogram counted values that the pieces no longer hold")
