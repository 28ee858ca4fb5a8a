"""MagMax: each value from the expert that moved it most."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.base import MISSING, Parameters, Spec, choice, scale
from moerge.merging.sources import Block

SPEC = Spec(
    name="magmax",
    title="MagMax",
    form="element-wise",
    summary="Each value comes from the expert in which it is largest.",
    when="Experts trained one after another, or with deltas of very different places and alike sizes.",
    paper="arXiv 2407.06322",
    is_ordered=True,
    parameters=(
        scale(),
        choice("tie", ["last", "first", "mean"], default="last", help="Which expert wins where magnitudes are equal."),
        MISSING,
    ),
)


def merge(block: Block, _state: None, parameters: Parameters) -> npt.NDArray[Any]:
    """scale * the w_t x_t of largest magnitude, (experts, values) -> (values,)."""
    values = parts.weigh(block.values, block.weights)
    magnitudes = np.abs(values)
    if parameters.tie == "mean":
        winners = magnitudes == magnitudes.max(axis=0)
        merged = parts.total(values * winners) / parts.total(winners.astype(values.dtype))
    else:
        merged, best = values[0].copy(), magnitudes[0].copy()
        for row, size in zip(values[1:], magnitudes[1:], strict=True):
            wins = size >= best if parameters.tie == "last" else size > best
            np.copyto(merged, row, where=wins)
            np.maximum(best, size, out=best)
    return np.asarray(merged * values.dtype.type(parameters.scale))
