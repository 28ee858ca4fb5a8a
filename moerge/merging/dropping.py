"""What methods share that drop values at random: bringing tensors back to the sum of magnitudes that they had."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]
Factors = dict[tuple[int, str], float]
# Which values of one expert's row of a block survive, (values,).
Kept = Callable[[Block, int], npt.NDArray[np.bool_]]


def l1_factors(stream: Stream, kept: Kept) -> Factors:
    """Sum of magnitudes before over after dropping, per expert and tensor; 1 where nothing is left.

    fsum over the sums of rows makes it the same for any size of blocks.
    """
    found: Factors = {}
    for name in stream.names:

        def sums(block: Block) -> list[tuple[list[float], list[float]]]:
            rows = []
            for row, values in enumerate(np.abs(block.values)):
                rows.append((_row_sums(values, block.width), _row_sums(values * kept(block, row), block.width)))
            return rows

        blocks = [part for _, part in stream.over_blocks(name, sums)]
        for row, member in enumerate(stream.members(name)):
            before = math.fsum(value for block in blocks for value in block[row][0])
            after = math.fsum(value for block in blocks for value in block[row][1])
            found[member, name] = before / after if after > 0 else 1.0
    return found


def _row_sums(values: Array, width: int) -> list[float]:
    sums: list[float] = values.reshape(-1, width).astype(np.float64).sum(axis=1).tolist()
    return sums
