"""RegMean: the linear map that answers the inputs of every expert as that expert does, in the least squares sense.

D = (sum_t w_t D_t G~_t) (sum_t w_t G~_t)^-1. On factors that is sum_t B_t [w_t A_t G~_t (sum G~)^-1]: only as many
right-hand sides as there are rank units, and no dense delta. Tensors that are not matrices are averaged.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, grams, statistics
from moerge.merging.base import MISSING, Parameters, Spec
from moerge.merging.sources import Delta, Factors, Stream

Float64 = npt.NDArray[np.float64]

SPEC = Spec(
    name="regmean",
    title="RegMean",
    form="whole",
    rank_rule="sum",
    summary="The delta that answers every expert's inputs most nearly as that expert does; exact on the factors.",
    when="Every expert comes with Gram matrices of its inputs; the best of the exact low-rank methods then.",
    paper="arXiv 2212.09849",
    group=2,
    needs=("gram_in",),
    divides_by_weights=True,
    parameters=(
        grams.OFF_DIAGONAL,
        grams.FALLBACK,
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield every tensor: a matrix of factors as factors of the total rank."""
    for name in stream.names:
        deltas = stream.deltas(name)
        weights = stream.weights[list(stream.members(name))]
        if statistics.has_all(stream, "gram_in", name) or (
            len(stream.shapes[name]) == 2 and parameters.fallback == "refuse"
        ):
            side = stream.shapes[name][1]
            known = statistics.of(stream, "gram_in", name, shape=(side, side))
            yield name, _solved(name, deltas, known, weights, shrink=parameters.off_diagonal)
        else:
            yield name, factors.weighted_sum(deltas, weights / weights.sum())


def _solved(name: str, deltas: list[Delta | None], known: list[Any], weights: Float64, *, shrink: float) -> Delta:
    summed = grams.total(known, weights, shrink=shrink)
    present = [
        (delta, gram, weight) for delta, gram, weight in zip(deltas, known, weights, strict=True) if delta is not None
    ]
    low = [delta for delta, _, _ in present if isinstance(delta, Factors)]
    if len(low) == len(present):
        rows = np.concatenate(
            [
                weight * grams.times(delta.A.astype(np.float64), gram, shrink=shrink)
                for delta, (_, gram, weight) in zip(low, present, strict=True)
            ]
        )
        return Factors(np.concatenate([delta.B for delta in low], axis=1), summed.solve(rows, name=name))
    answers = sum(
        weight * grams.times(factors.dense(delta).astype(np.float64), gram, shrink=shrink)
        for delta, gram, weight in present
    )
    return summed.solve(np.asarray(answers), name=name)
