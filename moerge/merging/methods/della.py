"""DELLA: drop values at random, small ones more often, then elect signs and average what agrees."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import noise, parts
from moerge.merging.base import MISSING, Limit, Parameters, Spec, choice, density, flag, number, scale
from moerge.merging.sources import Block

Array = npt.NDArray[Any]

SPEC = Spec(
    name="della",
    title="DELLA",
    form="element-wise",
    summary="Drop values at random, small ones more often than large ones, rescale, then elect signs as TIES does.",
    when="As DARE, where dropping small values more often than large ones keeps more of each expert.",
    paper="arXiv 2406.11617",
    is_random=True,
    parameters=(
        density(default=0.7),
        number(
            "epsilon",
            default=0.07,
            minimum=0.0,
            maximum=0.5,
            below=True,
            help="Keep probabilities rise over each row from density - epsilon to density + epsilon.",
        ),
        choice("elect", ["ties", "none"], default="ties", help="Elect signs first as TIES does, or add up."),
        flag("normalize", default=True, help="Divide by the weights: by those that agree, or by their sum."),
        scale(default=1.1),
        MISSING,
    ),
    limits=(
        Limit(plus=("density",), minus=("epsilon",), above=0.0),
        Limit(plus=("density", "epsilon"), at_most=1.0),
    ),
)


def merge(block: Block, _state: None, parameters: Parameters) -> Array:
    """(experts, values) -> (values,)."""
    dropped = np.zeros_like(block.values)
    for row, values in enumerate(block.values):
        probability = keep_probability(values.reshape(-1, block.width), parameters).ravel()
        kept = noise.keep(block.noise(row), probability)
        np.multiply(values * (1 / probability).astype(values.dtype), kept, out=dropped[row])
    return parts.combine(
        dropped,
        block.weights,
        elect=parameters.elect == "ties",
        normalize=parameters.normalize,
        scale=parameters.scale,
    )


def keep_probability(rows: Array, parameters: Parameters) -> npt.NDArray[np.float64]:
    """Probability to keep each value, rising with its rank by magnitude within its row, (rows, width) alike."""
    width = rows.shape[1]
    if width == 1 or parameters.epsilon == 0:
        return np.full(rows.shape, parameters.density)
    order = np.argsort(np.abs(rows), axis=1, kind="stable")
    rising = (parameters.density - parameters.epsilon) + np.arange(width) * (2 * parameters.epsilon / (width - 1))
    result = np.empty(rows.shape)
    np.put_along_axis(result, order, np.broadcast_to(rising, rows.shape), axis=1)
    return result
