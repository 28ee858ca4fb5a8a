"""PCB: balance how strongly a value matters within its expert against how the other experts see it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.base import MISSING, Parameters, Spec, number, scale
from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="pcb",
    title="PCB-Merging",
    form="element-wise",
    summary="Weigh each value by its strength within its expert and its agreement with the others, drop weak ones.",
    when="Experts compete for the same values; two to eight of them, with deltas of ordinary size.",
    paper="arXiv 2410.02396",
    parameters=(
        number(
            "ratio", default=0.1, minimum=0.0, above=True, maximum=1.0, help="Share of each expert's values to keep."
        ),
        scale(),
        MISSING,
    ),
)
_CLAMP = 1e-4


@dataclass(frozen=True)
class State:
    """Per expert: bounds that magnitudes are clamped to and their range, bounds that scores are clamped to."""

    magnitudes: dict[int, tuple[float, float]]
    scores: dict[int, tuple[float, float]]


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Order statistics of magnitudes and of scores over all tensors of each expert.

    This holds one score per value of one expert, the only method of this form whose memory grows with the model.
    """
    members = range(len(stream.sources))
    size = sum(stream.size(name) for name in stream.names)
    magnitudes = {}
    for member in members:
        ordered = np.sort(_gather(stream, member, lambda block, row: np.abs(block.values[row])))
        low, high = int(size * _CLAMP), int(size * (1 - _CLAMP) - 1)
        magnitudes[member] = (float(ordered[low]), float(ordered[max(high, 0)]))
    scores = {}
    for member in members:
        found = _gather(stream, member, lambda block, row: _scores(block, row, magnitudes))
        ordered = np.sort(found)
        floor = min(int(size * (1 - parameters.ratio) + parts.ROUNDING), size - 1)
        scores[member] = (float(ordered[floor]), float(ordered[-1]))
    return State(magnitudes, scores)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """scale * sum C_t b_t / sum b_t, (experts, values) -> (values,)."""
    numerator = np.zeros(block.values.shape[1])
    divisor = np.zeros(block.values.shape[1])
    for row, member in enumerate(block.members):
        low, high = state.magnitudes[member]
        values = block.values[row].astype(np.float64)
        clamped = np.sign(values) * np.clip(np.abs(values), low, high)
        floor, top = state.scores[member]
        balance = _between(np.clip(_scores(block, row, state.magnitudes), floor, top), floor, top)
        numerator += clamped * balance * block.weights[row]
        divisor += balance
    merged = parameters.scale * numerator / np.maximum(divisor, 1e-12)
    return np.asarray(merged, dtype=block.values.dtype)


def _scores(block: Block, row: int, magnitudes: dict[int, tuple[float, float]]) -> Array:
    """exp(T minmax(|x|)^2) * tanh(x * sum over experts), (values,)."""
    values = block.values.astype(np.float64)
    low, high = magnitudes[block.members[row]]
    strength = _between(np.clip(np.abs(values[row]), low, high), low, high)
    return np.asarray(np.exp(len(values) * np.square(strength)) * np.tanh(values[row] * parts.total(values)))


def _between(values: Array, low: float, high: float) -> Array:
    """Where values lie between two bounds, 0 to 1; 0 where the bounds are equal."""
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _gather(stream: Stream, member: int, work: Any) -> Array:
    """One number per value of one expert over all tensors."""
    found = []
    for name in stream.names:

        def one(block: Block) -> Array:
            row = block.members.index(member) if member in block.members else None
            empty: Array = np.zeros(block.values.shape[1])
            return empty if row is None else np.asarray(work(block, row))

        found += [part for _, part in stream.over_blocks(name, one)]
    return np.concatenate(found)
