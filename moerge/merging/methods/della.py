"""DELLA: drop values at random, small ones more often, then elect signs and average what agrees."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import dropping, noise, parts
from moerge.merging.base import MISSING, Limit, Parameters, Spec, choice, density, flag, number, scale
from moerge.merging.sources import Block, Stream

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
        choice(
            "rescale",
            ["probability", "l1", "none"],
            default="probability",
            help="Divide survivors by their own keep probability, bring each tensor back to its sum of magnitudes, or"
            " neither.",
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


def prepare(stream: Stream, parameters: Parameters) -> dropping.Factors:
    """Factor on the survivors of each expert and tensor; empty where each value has its own or none."""
    if parameters.rescale != "l1":
        return {}
    return dropping.l1_factors(
        stream, lambda block, row: noise.keep(block.noise(row), _probabilities(block, row, parameters))
    )


def merge(block: Block, state: dropping.Factors, parameters: Parameters) -> Array:
    """(experts, values) -> (values,)."""
    dropped = np.zeros_like(block.values)
    for row, values in enumerate(block.values):
        probability = _probabilities(block, row, parameters)
        kept = noise.keep(block.noise(row), probability)
        if parameters.rescale == "probability":
            factor: Any = (1 / probability).astype(values.dtype)
        else:
            factor = values.dtype.type(state.get((block.members[row], block.name), 1.0))
        np.multiply(values * factor, kept, out=dropped[row])
    return parts.combine(
        dropped,
        block.weights,
        elect=parameters.elect == "ties",
        normalize=parameters.normalize,
        scale=parameters.scale,
    )


def _probabilities(block: Block, row: int, parameters: Parameters) -> npt.NDArray[np.float64]:
    return keep_probability(block.values[row].reshape(-1, block.width), parameters).ravel()


def keep_probability(rows: Array, parameters: Parameters) -> npt.NDArray[np.float64]:
    """Probability to keep each value, rising with its rank by magnitude within its row, (rows, width) alike."""
    width = rows.shape[1]
    if width == 1 or parameters.epsilon == 0:
        return np.full(rows.shape, parameters.density)
    order = _by_magnitude(rows)
    rising = (parameters.density - parameters.epsilon) + np.arange(width) * (2 * parameters.epsilon / (width - 1))
    result = np.empty(rows.shape)
    np.put_along_axis(result, order, np.broadcast_to(rising, rows.shape), axis=1)
    return result


def _by_magnitude(rows: Array) -> npt.NDArray[np.int64]:
    """Places in each row by rising magnitude, equal ones by lower index first, (rows, width) alike."""
    if rows.dtype != np.float32:
        return np.argsort(np.abs(rows), axis=1, kind="stable")
    # Non-negative floats order as their bits do; with the place below them no two are equal, and numpy sorts such keys
    # nine times faster than it sorts places by magnitudes.
    keys = np.abs(rows).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).view(np.int64)
