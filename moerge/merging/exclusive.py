"""Experts as one shared part and, for each, an exclusive part that a router adds: how they are kept and applied.

    D = shared + sum_t gate_t exclusive_t

`arrays.split` makes the parts by a method that has them. With the gate of one expert at 1 and all others at 0 the parts
give that expert back, within the error that stands beside each part. Merging by the same method applies them with the
recipe's weights as gates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import RecipeInvalid
from moerge.merging import factors, selection
from moerge.merging.sources import Block, Delta, Factors, Stream

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Sparse:
    """A few values of a tensor: `places` are flat indices, `values` what stands there."""

    shape: tuple[int, ...]
    places: npt.NDArray[np.int64]
    values: Array

    def delta(self) -> Array:
        """The dense tensor."""
        found = np.zeros(int(np.prod(self.shape)), dtype=self.values.dtype)
        found[self.places] = self.values
        return found.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Signs:
    """One bit per value, packed, 1 for plus and for zero; and one scale for the whole tensor."""

    shape: tuple[int, ...]
    bits: npt.NDArray[np.uint8]
    scale: float
    dtype: np.dtype[Any]

    def delta(self) -> Array:
        """The dense tensor of scale and -scale."""
        found = np.unpackbits(self.bits, count=int(np.prod(self.shape))).reshape(self.shape)
        return np.asarray(np.where(found, self.scale, -self.scale), dtype=self.dtype)


Part = Array | Factors | Sparse | Signs


@dataclass(frozen=True, eq=False)
class Kept:
    """The exclusive part of one tensor of one expert, and the Frobenius norm of what it leaves out."""

    part: Part
    error: float


@dataclass(frozen=True, eq=False)
class Split:
    """The parts of several experts, each made when asked for, so that they never lie in memory together.

    `exclusive` takes a tensor's name and the position of an expert.
    """

    names: tuple[str, ...]
    shared: Callable[[str], Delta]
    exclusive: Callable[[str, int], Kept]


def apply(
    shared: Mapping[str, Delta], exclusives: Sequence[Mapping[str, Part]], gates: Sequence[float]
) -> dict[str, Delta]:
    """shared + sum_t gate_t exclusive_t for every tensor; factors where all parts are factors.

    `exclusives` are those of the experts that the router chose, `gates` their shares in the same order. Raises
    RecipeInvalid when there is not one gate per expert.
    """
    if len(gates) != len(exclusives):
        raise RecipeInvalid(
            f"There are {len(gates)} gates for {len(exclusives)} exclusive parts.",
            pointer="/gates",
            met=len(gates),
            wanted=len(exclusives),
            remedy="Give one gate per expert.",
        )
    found: dict[str, Delta] = {}
    for name, common in shared.items():
        parts = [exclusive[name] for exclusive in exclusives]
        deltas = [part.delta() if isinstance(part, Sparse | Signs) else part for part in parts]
        found[name] = factors.weighted_sum([common, *deltas], [1.0, *gates])
    return found


def shared(stream: Stream, name: str, *, scale: float) -> Delta:
    """scale * sum_t D_t."""
    return factors.weighted_sum(stream.deltas(name), [scale] * len(stream.sources))


def residuals(stream: Stream, *, scale: float) -> Stream:
    """A stream of what the shared part leaves of each expert, D_t - scale * sum_s D_s."""
    shapes = stream.shapes
    sources = [
        replace(source, tensors=_Residual(stream, place, scale), shapes=shapes)
        for place, source in enumerate(stream.sources)
    ]
    return replace(stream, sources=tuple(sources))


def with_shared(residual: Stream, stream: Stream, *, scale: float) -> Stream:
    """The same with the shared part as one more source behind the experts."""
    common = replace(stream.sources[0], tensors=_Shared(stream, scale), shapes=stream.shapes)
    return replace(residual, sources=(*residual.sources, common))


def trimmed(residual: Stream, cuts: selection.Cuts, name: str, expert: int) -> Kept:
    """The values of one residual that its cut keeps."""
    cut = cuts[expert, name]
    places, values, lost = [], [], 0.0
    for offset, found in residual.blocks(name, expert):
        mask = cut.mask(found, offset)
        places.append(np.flatnonzero(mask) + offset)
        values.append(found[mask])
        lost += float(np.square(found[~mask], dtype=np.float64).sum())
    shape = residual.shapes[name]
    return Kept(Sparse(shape, np.concatenate(places), np.concatenate(values)), float(np.sqrt(lost)))


def add_trimmed(block: Block, cuts: selection.Cuts) -> Array:
    """shared + sum_t w_t trimmed_t on a block whose last row is the shared part, (experts + 1, values) -> (values,)."""
    merged: Array = block.values[-1].copy()
    for row, weight in enumerate(block.weights[:-1]):
        kept = cuts[row, block.name].mask(block.values[row], block.offset)
        merged += block.values[row] * kept * merged.dtype.type(weight)
    return merged


class _Tensors(Mapping[str, Delta]):
    """Tensors that are sums of those of a stream, formed when read."""

    def __init__(self, stream: Stream, scale: float) -> None:
        self._stream, self._scale = stream, scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream.names)

    def __len__(self) -> int:
        return len(self._stream.names)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would form the tensor to see whether it is there.
        return name in self._stream.shapes


class _Shared(_Tensors):
    def __getitem__(self, name: str) -> Delta:
        return shared(self._stream, name, scale=self._scale)


class _Residual(_Tensors):
    def __init__(self, stream: Stream, place: int, scale: float) -> None:
        super().__init__(stream, scale)
        self._place = place

    def __getitem__(self, name: str) -> Delta:
        deltas = self._stream.deltas(name)
        coefficients = [float(place == self._place) - self._scale for place in range(len(deltas))]
        return factors.weighted_sum(deltas, coefficients)
