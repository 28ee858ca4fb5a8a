"""MaTS: the merge that matches every expert in the directions its task uses, by conjugate gradient.

It solves sum_t w_t H~_t D G~_t = sum_t w_t H~_t D_t G~_t, where G~ is the Gram matrix of what a module reads and H~
that of the gradients at what it writes, or the identity, which is what RegMean solves. The result depends on the merge
it starts from and on the number of steps, as the authors stop early. Without H everything stays in the span of the
experts' B, so factors are solved as factors. Tensors that are not matrices are averaged.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, grams, statistics
from moerge.merging.base import MISSING, Parameters, Spec, choice, integer, number
from moerge.merging.sources import Delta, Factors, Stream

Float64 = npt.NDArray[np.float64]

SPEC = Spec(
    name="mats",
    title="MaTS",
    form="whole",
    summary="Matches experts in the directions their tasks use, by conjugate gradient on their Gram matrices.",
    when="Every expert comes with Gram matrices, and RegMean is not close enough.",
    paper="arXiv 2312.04339",
    group=2,
    needs=("gram_in",),
    divides_by_weights=True,
    parameters=(
        choice(
            "objective",
            ["input", "input_output"],
            default="input",
            help="Match by the Gram matrices of inputs, or also by those of output gradients, gram_out.",
        ),
        integer("iterations", default=100, minimum=1, maximum=10_000, help="Steps of conjugate gradient at most."),
        grams.OFF_DIAGONAL,
        choice(
            "start",
            ["average", "task_arithmetic"],
            default="average",
            help="The merge to start from: the weighted mean, or the weighted sum times start_scale.",
        ),
        number("start_scale", default=0.3, help="Factor on the weighted sum, where that is the start."),
        grams.FALLBACK,
        MISSING,
    ),
)
# Conjugate gradient stops where the residual is below this share of the right-hand side.
_ENOUGH = 1e-5


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield every tensor: a matrix of factors as factors of the total rank where only inputs count."""
    kinds = ("gram_in", "gram_out") if parameters.objective == "input_output" else ("gram_in",)
    for name in stream.names:
        deltas = stream.deltas(name)
        weights = stream.weights[list(stream.members(name))]
        is_known = all(statistics.has_all(stream, kind, name) for kind in kinds)
        if is_known or (len(stream.shapes[name]) == 2 and parameters.fallback == "refuse"):
            rows, columns = stream.shapes[name]
            known = [
                statistics.of(stream, kind, name, shape=(side, side))
                for kind, side in zip(kinds, (columns, rows), strict=False)
            ]
            yield name, _matched(name, deltas, known, weights, parameters)
        else:
            yield name, factors.weighted_sum(deltas, weights / weights.sum())


def _matched(
    name: str, deltas: list[Delta | None], known: list[list[Any]], weights: Float64, parameters: Parameters
) -> Delta:
    """Solve for one matrix: its rows in an orthonormal basis of the experts' B, or as they are."""
    shrink = parameters.off_diagonal
    basis, rows = _coordinates(deltas, is_low=len(known) == 1)
    start = sum(weight * found for weight, found in zip(weights, rows, strict=True))
    start = start / weights.sum() if parameters.start == "average" else start * parameters.start_scale
    apply, goal = _equations(known, weights, rows, shrink=shrink)
    solved = _conjugate_gradient(apply, goal, np.asarray(start), steps=parameters.iterations, name=name)
    return solved if basis is None else Factors(basis, solved)


def _equations(
    known: list[list[Any]], weights: Float64, rows: list[Float64], *, shrink: float
) -> tuple[Callable[[Float64], Float64], Float64]:
    """The map x -> sum_t w_t H~_t x G~_t, and what it should give."""
    inner = [grams.total([gram], [weight], shrink=shrink) for gram, weight in zip(known[0], weights, strict=True)]
    if len(known) == 1:
        goal = sum(one.times(found) for one, found in zip(inner, rows, strict=True))
        return grams.total(known[0], weights, shrink=shrink).times, np.asarray(goal)
    outer = [grams.total([gram], [1.0], shrink=shrink) for gram in known[1]]

    def answers(found: list[Float64]) -> Float64:
        pairs = zip(inner, outer, found, strict=True)
        return np.asarray(sum(right.times(left.times(one).T).T for left, right, one in pairs))

    return lambda found: answers([found] * len(inner)), answers(rows)


def _coordinates(deltas: list[Delta | None], *, is_low: bool) -> tuple[Float64 | None, list[Float64]]:
    """An orthonormal basis of all B and every delta in it, or no basis and the dense deltas."""
    present = [delta for delta in deltas if delta is not None]
    low = [delta for delta in present if isinstance(delta, Factors)]
    if not is_low or len(low) < len(present):
        empty = np.zeros(present[0].shape)
        return None, [empty if delta is None else factors.dense(delta).astype(np.float64) for delta in deltas]
    Q = np.asarray(np.linalg.qr(np.concatenate([delta.B.astype(np.float64) for delta in low], axis=1))[0])
    empty = np.zeros((Q.shape[1], present[0].shape[1]))
    return Q, [(Q.T @ delta.B) @ delta.A if isinstance(delta, Factors) else empty for delta in deltas]


def _conjugate_gradient(
    apply: Callable[[Float64], Float64], goal: Float64, start: Float64, *, steps: int, name: str
) -> Float64:
    """The solution of apply(x) = goal for a symmetric positive map, one step length for the whole matrix.

    Raises ExpertsIncompatible when the map turns out not to be positive.
    """
    enough = _ENOUGH * float(np.linalg.norm(goal))
    if enough == 0:
        return np.zeros_like(goal)
    found = start.copy()
    residual = goal - apply(found)
    direction, before = residual.copy(), float(np.vdot(residual, residual))
    for _ in range(steps):
        if np.sqrt(before) < enough:
            break
        mapped = apply(direction)
        curvature = float(np.vdot(direction, mapped))
        if curvature <= 0:
            raise grams.not_positive(name)
        found += (before / curvature) * direction
        residual -= (before / curvature) * mapped
        after = float(np.vdot(residual, residual))
        direction = residual + (after / before) * direction
        before = after
    return found
