"""LoRA-LEGO: pool the rank units of all experts, cluster them, and build the merge from one unit per cluster.

A unit is a row of A with its column of B. Before clustering each is brought to one form, as (b / s) (s a)^T is the same
delta for every s: both halves equally long, scaling and weight folded in, the largest value of a positive. The paper
has no public code: this form, what the reweighting is, and that units of zero are left out are ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import noise
from moerge.merging.base import Parameters, Spec, flag, integer
from moerge.merging.sources import Factors

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

SPEC = Spec(
    name="lora_lego",
    title="LoRA-LEGO",
    form="factor",
    rank_rule="largest",
    summary="The rank units of all experts, clustered; each cluster becomes one unit of the merge.",
    when="The rank must not grow, and experts share rank units.",
    paper="arXiv 2409.16167",
    parameters=(
        integer(
            "units",
            default=None,
            minimum=1,
            maximum=4096,
            help="Clusters per module. Null: as many as the largest expert has units. For more ask for that rank.",
        ),
        flag(
            "restore_norm",
            default=True,
            help="Bring each merged unit to the mean length of its cluster, which averaging shortens.",
        ),
        flag(
            "restore_variance",
            default=True,
            help="Multiply by the root of the experts' mean number of units over that of the merge.",
        ),
    ),
)
_RESTARTS = 10
_ROUNDS = 100


def merge(items: Sequence[Factors], weights: npt.NDArray[np.float64], parameters: Parameters) -> Factors:
    """Factors of one column of B and one row of A per cluster."""
    d_in = items[0].shape[1]
    pools = [_units(item, weight) for item, weight in zip(items, weights, strict=True)]
    counts = [len(pool) for pool in pools if len(pool)]
    dtype = np.result_type(*(part.dtype for item in items for part in item))
    if not counts:
        return Factors(np.zeros((items[0].shape[0], 1), dtype), np.zeros((1, d_in), dtype))
    units = np.concatenate(pools)
    # The result must not depend on the order of units within an expert, and the first centres do.
    units = units[np.lexsort((units.sum(axis=1), np.linalg.norm(units, axis=1)))]
    labels = clusters(units @ units.T, parameters.units or max(counts))
    member = labels[None] == np.unique(labels)[:, None]
    merged = (member / member.sum(axis=1, keepdims=True)) @ units
    if parameters.restore_norm:
        lengths, wanted = np.linalg.norm(merged, axis=1), np.linalg.norm(units, axis=1)
        mean = member @ wanted / member.sum(axis=1)
        merged *= np.where(lengths > 0, mean / np.where(lengths > 0, lengths, 1.0), 0.0)[:, None]
    factor = np.sqrt(sum(counts) / len(counts) / len(merged)) if parameters.restore_variance else 1.0
    return Factors(
        np.ascontiguousarray((factor * merged[:, d_in:].T).astype(dtype)),
        np.ascontiguousarray(merged[:, :d_in].astype(dtype)),
    )


def coefficients(weights: npt.NDArray[np.float64], _parameters: Parameters) -> npt.NDArray[Any]:
    """Tensors without factors have no units; they are added up."""
    return weights


def clusters(gram: Float64, count: int) -> npt.NDArray[np.intp]:
    """k-means on points given by their inner products, (points, points) -> the cluster of each, (points,).

    The best of ten starts by k-means++ (Arthur and Vassilvitskii, SODA 2007), each with its own fixed noise.
    """
    points = len(gram)
    if count >= points:
        return np.arange(points)
    squares = gram.diagonal()
    best, labels = np.inf, np.zeros(points, np.intp)
    for restart in range(_RESTARTS):
        centres = _first_centres(gram, count, key=noise.key(0, "lora_lego", str(restart)))
        distances = squares[centres][:, None] - 2 * gram[centres] + squares
        found = distances.argmin(axis=0)
        for _ in range(_ROUNDS):
            distances = _distances(gram, found, count)
            moved = distances.argmin(axis=0)
            if (moved == found).all():
                break
            found = moved
        cost = float(np.maximum(_distances(gram, found, count)[found, np.arange(points)], 0).sum())
        if cost < best:
            best, labels = cost, found
    return labels


def _distances(gram: Float64, labels: npt.NDArray[np.intp], count: int) -> Float64:
    """Squared distance of every point from the mean of every cluster, (clusters, points); infinite from empty ones."""
    member = labels[None] == np.arange(count)[:, None]
    sizes = member.sum(axis=1, keepdims=True)
    means = member / np.maximum(sizes, 1)
    cross = means @ gram
    found = gram.diagonal() - 2 * cross + np.einsum("cp,cp->c", cross, means)[:, None]
    return np.where(sizes > 0, found, np.inf)


def _first_centres(gram: Float64, count: int, *, key: tuple[int, int]) -> list[int]:
    """Points far from each other: each next one with a probability that grows with its squared distance."""
    draws = noise.stream(key, 0, count) / noise.STEPS
    squares = gram.diagonal()
    chosen = [int(draws[0] * len(gram))]
    nearest = np.full(len(gram), np.inf)
    for draw in draws[1:]:
        last = chosen[-1]
        nearest = np.minimum(nearest, np.maximum(squares - 2 * gram[last] + squares[last], 0))
        nearest[last] = 0
        total = np.cumsum(nearest)
        if total[-1] == 0:
            break
        chosen.append(int(np.searchsorted(total, draw * total[-1], side="right")))
    return chosen


def _units(item: Factors, weight: float) -> Float64:
    """The rank units of one expert that are not zero, a and b side by side in their one form, (units, d_in + d_out)."""
    a, b = item.A.astype(np.float64), item.B.T.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    kept = (lengths[0] * lengths[1] * weight) != 0
    a, b, length_a, length_b = a[kept], b[kept], lengths[0][kept], lengths[1][kept]
    root = np.sqrt(np.abs(weight) * length_a * length_b)
    largest = np.take_along_axis(a, np.abs(a).argmax(axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(largest < 0, -1.0, 1.0)
    return np.concatenate(
        [a * (sign * root / length_a)[:, None], b * (sign * np.sign(weight) * root / length_b)[:, None]], axis=1
    )
