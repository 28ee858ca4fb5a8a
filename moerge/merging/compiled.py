"""Inner loops of large merges compiled by numba, where the extra `moerge[compiled]` has brought it.

They give the same bits as the numpy code beside which they stand, in a fraction of the time: one pass over each block
and no arrays in between. Without numba nothing changes but the time.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Values of a merge, over all experts, from which on the loops repay the second that it takes to load them.
WORTH_IT = 1 << 26
_CHUNK = 2048


@dataclass(frozen=True)
class Kernels:
    """The loops of this file, compiled: `gather` and `elect_and_merge` take what the functions of these names take."""

    gather: Callable[..., tuple[int, int]]
    elect_and_merge: Callable[..., Array]


def kernels(values: int, *, wanted: bool | None = None) -> Kernels | None:
    """The compiled loops for a merge of so many values, or None where they are absent or not worth it.

    `wanted` asks for them whatever the size, or forbids them.
    """
    worth_it = values >= WORTH_IT if wanted is None else wanted
    return _compiled() if worth_it else None


@cache
def _compiled() -> Kernels | None:
    if importlib.util.find_spec("numba") is None:
        return None
    numba = importlib.import_module("numba")
    try:
        return Kernels(*(numba.njit(nogil=True, cache=True)(loop) for loop in (gather, elect_and_merge)))
    except RuntimeError:
        # No folder that machine code could be kept in; then it is compiled anew in each process.
        return Kernels(*(numba.njit(nogil=True)(loop) for loop in (gather, elect_and_merge)))


def gather(
    values: Array, low: np.floating[Any], high: np.floating[Any], places: npt.NDArray[np.int64]
) -> tuple[int, int]:
    """How many magnitudes lie above `high`, and how many from `low` to `high`, whose places are written out.

    `places` has room for one more than `values`.
    """
    above = 0
    for place in range(values.size):
        above += abs(values[place]) > high
    is_inside = np.zeros((values.size + 7) // 8 * 8, np.uint8)
    for place in range(values.size):
        is_inside[place] = (abs(values[place]) >= low) & (abs(values[place]) <= high)
    found = 0
    eights = is_inside.view(np.uint64)
    for eight in range(eights.size):
        if eights[eight]:
            for place in range(8 * eight, 8 * eight + 8):
                # Written each time and kept only if inside, which takes less time than to branch.
                places[found] = place
                found += is_inside[place]
    return above, found


def elect_and_merge(  # noqa: C901, PLR0912  One loop after the other over a chunk that stays in cache.
    values: Array,
    own_numbers: Array,
    reaches: npt.NDArray[np.int64],
    choices: tuple[bool, bool, bool, bool],
    scale: np.floating[Any],
) -> Array:
    """TIES on a block, (experts, values) -> (values,): trim, elect a sign, merge what agrees with it.

    Rows of `own_numbers`, (3, experts): threshold, weight, part of the divisor. An expert keeps what is larger than its
    threshold, and what equals it among the first `reaches` values; where it agrees its part is added to the divisor,
    and a divisor of zero is one. `choices`: elect by weighted values, elect by signs, let zero votes elect minus, take
    the largest in place of the sum.
    """
    by_weight, by_sign, is_minus, is_largest = choices
    experts, count = values.shape
    one, zero = values.dtype.type(1), values.dtype.type(0)
    kept = np.empty((experts, _CHUNK), values.dtype)
    votes, divisor, merged = (
        np.empty(_CHUNK, values.dtype),
        np.empty(_CHUNK, values.dtype),
        np.empty(count, values.dtype),
    )
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        votes[:] = zero
        divisor[:] = zero
        for expert in range(experts):
            row, own = values[expert, start : start + size], kept[expert]
            threshold, weight, reach = own_numbers[0, expert], own_numbers[1, expert], reaches[expert] - start
            if reach >= size:
                for i in range(size):
                    own[i] = row[i] * (one if abs(row[i]) >= threshold else zero)
            else:
                for i in range(size):
                    own[i] = row[i] * (
                        one if (abs(row[i]) > threshold) | ((abs(row[i]) == threshold) & (i < reach)) else zero
                    )
            if by_weight:
                for i in range(size):
                    own[i] *= weight
            if by_sign:
                for i in range(size):
                    votes[i] += np.sign(own[i])
            else:
                for i in range(size):
                    votes[i] += own[i]
        for i in range(size):
            votes[i] = -one if (votes[i] < zero) | (is_minus & (votes[i] == zero)) else one
        total = merged[start : start + size]
        for expert in range(experts):
            own = kept[expert]
            weight, part = one if by_weight else own_numbers[1, expert], own_numbers[2, expert]
            for i in range(size):
                agrees = one if own[i] * votes[i] > zero else zero
                own[i] = own[i] * weight * agrees
                divisor[i] += agrees * part
            if is_largest:
                for i in range(size):
                    total[i] = abs(own[i]) if expert == 0 else max(total[i], abs(own[i]))
            else:
                for i in range(size):
                    total[i] = own[i] if expert == 0 else total[i] + own[i]
        for i in range(size):
            if is_largest:
                total[i] *= votes[i]
            else:
                total[i] /= divisor[i] + (one if divisor[i] == zero else zero)
            total[i] *= scale
    return merged
