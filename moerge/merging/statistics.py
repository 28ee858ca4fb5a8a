"""What is known about experts beside their deltas: statistics of the data they were trained on, by kind and tensor.

fisher_diag   mean squared gradient of the log-likelihood per value of a delta: an array of the delta's shape, or
              Factors of rank 1 (row means times column means), d_out + d_in numbers in place of d_out * d_in
gram_in       X^T X / tokens of what a module reads, (d_in, d_in): an array or a Gram of few directions
gram_out      the same of the gradients at what a module writes, (d_out, d_out)

Statistics of one expert are a mapping kind -> tensor name -> values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging.base import Spec
from moerge.merging.sources import Factors, Source, Stream

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Statistics = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Gram:
    """A Gram matrix as `vectors.T diag(values) vectors + diag(rest)`: vectors (k, d), values (k,), rest (d,).

    Its leading eigenpairs and the remainder of its diagonal take k + 1 rows in place of d.
    """

    vectors: Array
    values: Array
    rest: Array

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.rest.size), int(self.rest.size)

    def dense(self) -> Float64:
        """The matrix itself, (d, d)."""
        vectors = self.vectors.astype(np.float64)
        return np.asarray(
            (vectors.T * self.values.astype(np.float64)) @ vectors + np.diag(self.rest.astype(np.float64))
        )

    def diagonal(self) -> Float64:
        """Its diagonal, (d,)."""
        vectors = self.vectors.astype(np.float64)
        return np.asarray(self.values.astype(np.float64) @ np.square(vectors) + self.rest.astype(np.float64))


def check(spec: Spec, sources: Sequence[Source]) -> None:
    """Raise ExpertsIncompatible, naming the expert and the kind, where a method lacks the statistics it needs."""
    for kind in spec.needs:
        for source in sources:
            if kind not in source.statistics:
                raise _lacking(f"{spec.name} needs {kind} of every expert, and {source} comes without.", kind)


def of(stream: Stream, kind: str, name: str, *, shape: tuple[int, ...]) -> list[Any]:
    """One kind of statistics of one tensor for every member.

    A member whose delta is zero because it does not have the tensor counts with its statistics too, so it must come
    with them. Raises ExpertsIncompatible, naming expert and tensor, where they are absent or do not fit.
    """
    found = []
    for member in stream.members(name):
        source = stream.sources[member]
        given = source.statistics.get(kind, {}).get(name)
        if given is None:
            raise _lacking(f"{source} comes without {kind} of {name}.", kind)
        _check_fit(source, kind, name, given, shape)
        found.append(given)
    return found


def has_all(stream: Stream, kind: str, name: str) -> bool:
    """Whether every member has this kind of statistics of a tensor."""
    return all(name in stream.sources[member].statistics.get(kind, {}) for member in stream.members(name))


def _check_fit(source: Source, kind: str, name: str, given: Any, shape: tuple[int, ...]) -> None:
    parts = given if isinstance(given, Factors) else _parts(given)
    if tuple(given.shape) != shape:
        met, wanted = f"shape {list(given.shape)}", f"shape {list(shape)}"
    elif not all(np.isfinite(part).all() for part in parts):
        met, wanted = "NaN or infinity", "finite values"
    elif kind == "fisher_diag" and any((part < 0).any() for part in parts):
        met, wanted = "a mean square below zero", "values of zero or more"
    else:
        return
    raise ExpertsIncompatible(
        f"{kind} of {name} in {source} has {met}, wanted {wanted}.",
        pointer="/experts",
        met=met,
        wanted=wanted,
        remedy=f"Gather {kind} of {source} anew.",
    )


def _parts(given: Any) -> tuple[Array, ...]:
    return (given.vectors, given.values, given.rest) if isinstance(given, Gram) else (given,)


def _lacking(detail: str, kind: str) -> ExpertsIncompatible:
    return ExpertsIncompatible(
        detail,
        pointer="/experts",
        met="nothing",
        wanted=kind,
        remedy=f"Hand in {kind} of every expert, or choose a method that needs none, such as linear.",
    )
