"""Fisher merging: the mean of deltas in which each value counts by how much its expert's likelihood depends on it.

With sum g_t F_t D_t / sum g_t F_t the base cancels out, so that merging deltas and merging full weights are one thing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, parts, statistics
from moerge.merging.base import MISSING, Parameters, Spec, choice, flag, number
from moerge.merging.sources import Block, Delta, Factors, Stream, rows_of

Array = npt.NDArray[Any]

SPEC = Spec(
    name="fisher",
    title="Fisher merging",
    form="element-wise",
    summary="The mean of deltas, each value weighted by its Fisher information in that expert.",
    when="Every expert comes with its Fisher information, and experts disagree about the same values.",
    paper="arXiv 2111.09832",
    group=2,
    needs=("fisher_diag",),
    divides_by_weights=True,
    parameters=(
        number(
            "floor",
            default=1e-6,
            minimum=0.0,
            above=True,
            help="Smallest information, so that a value which matters to no expert is the plain mean.",
        ),
        choice(
            "floor_by",
            ["add", "max"],
            default="add",
            help="Add the floor to the information, or raise what is below to it.",
        ),
        flag(
            "equalize",
            default=False,
            help="Divide each expert's information by its norm over all tensors, so that no expert dominates.",
        ),
        MISSING,
    ),
)
# What keeps the norm of an expert without any information from dividing by zero, as published.
_NORM_FLOOR = 1e-6


@dataclass(frozen=True)
class State:
    """Per tensor the information of its members, and the weight of each expert."""

    information: dict[str, list[Delta]]
    weights: Array


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Find the statistics, and the norms where they count."""
    found = {name: statistics.of(stream, "fisher_diag", name, shape=stream.shapes[name]) for name in stream.names}
    weights = stream.weights
    if parameters.equalize:
        squares = np.zeros(len(weights))
        for name, information in found.items():
            for member, given in zip(stream.members(name), information, strict=True):
                squares[member] += factors.square_norm_of(given) if isinstance(given, Factors) else _square(given)
        shares = 1 / (np.sqrt(squares) + _NORM_FLOOR)
        weights = weights * shares / shares.sum()
    return State(found, weights)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """sum g_t F_t x_t / sum g_t F_t, (experts, values) -> (values,)."""
    count = block.values.shape[1]
    first, last = block.offset // block.width, (block.offset + count) // block.width
    numerator, divisor = np.zeros(count), np.zeros(count)
    for row, (member, given) in enumerate(zip(block.members, state.information[block.name], strict=True)):
        information = rows_of(given, first, last).astype(np.float64)
        if parameters.floor_by == "add":
            information += parameters.floor
        else:
            np.maximum(information, parameters.floor, out=information)
        information *= state.weights[member]
        divisor += information
        numerator += information * block.values[row]
    return np.asarray(parts.divide(numerator, divisor), dtype=block.values.dtype)


def _square(information: Array) -> float:
    return factors.square_norm(information.reshape(1, -1) if information.ndim < 2 else information)
