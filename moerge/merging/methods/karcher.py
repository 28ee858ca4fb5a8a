"""Karcher mean: the point on the sphere from which the arcs to all experts balance, at their mean length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import mixing
from moerge.merging.base import MISSING, Parameters, Spec, integer, number
from moerge.merging.sources import Delta, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="karcher",
    title="Karcher mean",
    form="whole",
    rank_rule="sum",
    summary="The true mean on the sphere of the experts' directions, at their mean length; exact on the factors.",
    when="Three or more experts whose directions matter more than their sizes.",
    paper="Karcher, Riemannian center of mass and mollifier smoothing (1977); arcee-ai/mergekit, karcher",
    divides_by_weights=True,
    parameters=(
        integer("steps", default=50, minimum=1, maximum=1000, help="Stop after this many steps."),
        number(
            "tolerance",
            default=1e-7,
            minimum=0.0,
            maximum=1.0,
            help="Stop when a step is shorter than this angle.",
        ),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """m <- exp_m(sum w log_m(u)) from the normalised mean, times the mean length.

    Every step stays in the span of the deltas, so it is done on coefficients and inner products alone. A zero delta
    has no direction, and counts in the mean length.
    """
    for name in stream.names:
        deltas = stream.held(name)
        weights = mixing.shares(stream.weights[list(stream.members(name))], name=name)
        inner = mixing.products(deltas)
        found = _mean(inner, weights, parameters, name=name)
        yield name, mixing.total(deltas, (weights @ mixing.lengths(inner)) * found)


def _mean(inner: Array, weights: Array, parameters: Parameters, *, name: str) -> Array:
    """Coefficients on the deltas of the mean of their directions, (experts, experts), (experts,) -> (experts,)."""
    sizes = mixing.lengths(inner)
    is_live = sizes > 0
    lengths = np.where(is_live, sizes, 1.0)
    cosines = inner / np.outer(lengths, lengths)
    mean = mixing.mean_direction(inner, weights, name=name) * lengths
    weights = np.where(is_live, weights, 0.0)
    if not is_live.any():
        return mean
    weights = mixing.shares(weights, name=name)
    for _ in range(parameters.steps):
        step = _tangent(cosines, weights, mean)
        size = np.sqrt(max(step @ cosines @ step, 0.0))
        if size < parameters.tolerance or size == 0:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / np.sqrt(mean @ cosines @ mean)
    return np.asarray(np.where(is_live, mean / lengths, 0.0))


def _tangent(cosines: Array, weights: Array, mean: Array) -> Array:
    """sum w log_m(u), where log_m(u) = angle / sin(angle) * (u - cos(angle) m).

    No arc to the opposite point is the shortest, so an expert there pulls nowhere.
    """
    cosine = np.clip(cosines @ mean, -1.0, 1.0)
    angle, sine = np.arccos(cosine), np.sqrt(1.0 - cosine**2)
    is_far = sine > 1e-9
    pulls = weights * np.where(is_far, angle / np.where(is_far, sine, 1.0), cosine > 0)
    return np.asarray(pulls - (pulls @ cosine) * mean)
