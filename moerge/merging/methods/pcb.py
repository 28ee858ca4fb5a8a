"""PCB: balance how strongly a value matters within its expert against how the other experts see it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts, selection
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
    """Order statistics of magnitudes and of scores over all tensors of each expert."""
    size = sum(stream.size(name) for name in stream.names)
    low, high = int(size * _CLAMP), max(int(size * (1 - _CLAMP) - 1), 0)
    floor = min(int(size * (1 - parameters.ratio) + parts.ROUNDING), size - 1)
    magnitudes, scores = {}, {}
    for member in range(len(stream.sources)):
        found = _Magnitudes(stream, member)
        magnitudes[member] = (found.at(low), found.at(high))
    for member in range(len(stream.sources)):
        scored = _Scores(stream, member, magnitudes[member])
        scores[member] = (scored.at(floor), max(scored.tops))
    return State(magnitudes, scores)


@dataclass(frozen=True)
class _Magnitudes:
    """The magnitude of every value of one expert over all tensors, 0 in tensors in which it does not take part."""

    stream: Stream
    member: int

    def at(self, place: int) -> float:
        """The number at a place in rising order."""
        size = sum(map(self.stream.size, self.stream.names))
        # What can be ranked in passes is magnitudes: first of the numbers above zero, then of the others.
        above = self._largest(1, size - place, size)
        return above if above > 0 else -self._largest(-1, place + 1, size)

    def _largest(self, sign: int, number: int, size: int) -> float:
        """The so-manieth largest of the numbers of one sign, 0 when there are not so many."""

        def pieces() -> Iterator[tuple[int, Array]]:
            offset = 0
            for name in self.stream.names:
                for found in self.stretches(name):
                    yield offset, np.maximum(sign * found, 0)
                    offset += found.size

        def sample() -> Array:
            counts = {name: selection.SAMPLE_VALUES * self.stream.size(name) // size + 64 for name in self.stream.names}
            found = np.concatenate([self.sample(name, count) for name, count in counts.items()])
            return np.asarray(np.maximum(sign * found, 0))

        if number >= size:
            return min(float(part.min()) for _, part in pieces())
        return selection.find(pieces, size=size, kept=number, sample=sample, kernels=self.stream.kernels)[0]

    def has(self, name: str) -> bool:
        """Whether the expert has this tensor."""
        return name in self.stream.sources[self.member].tensors

    def stretches(self, name: str) -> Iterator[Array]:
        """The numbers of one tensor."""
        if self.has(name):
            yield from (np.abs(found) for _, found in self.stream.blocks(name, self.member))
        else:
            yield np.zeros(self.stream.size(name))

    def sample(self, name: str, count: int) -> Array:
        """About so many of the numbers of one tensor."""
        return np.abs(self.stream.sample(name, self.member, count)) if self.has(name) else np.zeros(count)


@dataclass(frozen=True)
class _Scores(_Magnitudes):
    """The score of every value of one expert, and the largest that were met."""

    bounds: tuple[float, float]
    tops: list[float] = field(default_factory=list)

    def stretches(self, name: str) -> Iterator[Array]:
        """The scores of one tensor."""
        for _, values in self.stream.stretches(name):
            found = self._scores(values, name)
            self.tops.append(float(found.max()))
            yield found

    def sample(self, name: str, count: int) -> Array:
        """About so many of the scores of one tensor."""
        return self._scores(self.stream.samples(name, count), name)

    def _scores(self, values: Array, name: str) -> Array:
        members = self.stream.members(name)
        if self.member not in members:
            return np.zeros(values.shape[1])
        own = values[members.index(self.member)].astype(np.float64)
        return _scored(own, _total(values), len(values), bounds=self.bounds)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """scale * sum C_t b_t / sum b_t, (experts, values) -> (values,)."""
    numerator = np.zeros(block.values.shape[1])
    divisor = np.zeros(block.values.shape[1])
    summed = _total(block.values)
    for member, row, weight in zip(block.members, block.values, block.weights, strict=True):
        low, high = state.magnitudes[member]
        values = row.astype(np.float64)
        floor, top = state.scores[member]
        scored = _scored(values, summed, len(block.values), bounds=(low, high))
        balance = _between(np.clip(scored, floor, top, out=scored), floor, top)
        clamped = np.copysign(np.clip(np.abs(values), low, high), values)
        # A zero has no sign.
        clamped *= values != 0
        numerator += clamped * balance * weight
        divisor += balance
    merged = parameters.scale * numerator / np.maximum(divisor, 1e-12)
    return np.asarray(merged, dtype=block.values.dtype)


def _scored(values: Array, summed: Array, experts: int, *, bounds: tuple[float, float]) -> Array:
    """exp(T minmax(|x|)^2) * tanh(x * sum over experts), (values,)."""
    strength = _between(np.clip(np.abs(values), *bounds), *bounds)
    return np.asarray(np.exp(experts * np.square(strength)) * np.tanh(values * summed))


def _total(values: Array) -> Array:
    """The sum over experts in float64, (experts, values) -> (values,)."""
    summed: Array = values[0].astype(np.float64)
    for row in values[1:]:
        summed += row
    return summed


def _between(values: Array, low: float, high: float) -> Array:
    """Where values lie between two bounds, 0 to 1; 0 where the bounds are equal."""
    return np.asarray((values - low) / (high - low)) if high > low else np.zeros_like(values)
