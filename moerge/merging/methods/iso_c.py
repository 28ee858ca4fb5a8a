"""Iso-C: the sum of deltas with all its singular values made equal."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.base import Parameters, Spec, scale

Array = npt.NDArray[Any]

SPEC = Spec(
    name="iso_c",
    title="Iso-C",
    form="core",
    rank_rule="sum",
    summary="Sum of deltas whose singular values are all replaced by their mean, so that no direction dominates.",
    when="Four or more experts of alike strength: with Iso-CTS the best on the demo experts, at a scale of 1.",
    paper="arXiv 2502.04959",
    parameters=(scale(),),
)


def merge(cores: Array, weights: Array, _ranks: tuple[int, ...], parameters: Parameters) -> Array:
    """scale * mean(S) * U V^T of the weighted sum, (experts, rows, columns) -> (rows, columns).

    The mean runs over the rank that the experts span together, not over the sides of the dense matrix: on low-rank
    deltas the published code picks arbitrary null vectors there.
    """
    summed = parts.weighted_total(cores.reshape(len(cores), -1), weights).reshape(cores.shape[1:])
    U, S, Vt = np.linalg.svd(summed, full_matrices=False)
    return np.asarray(parameters.scale * S.mean() * (U @ Vt))


def merge_vectors(values: Array, weights: Array, _parameters: Parameters) -> Array:
    """The weighted mean over experts, (experts, ...) -> (...)."""
    flat = parts.weighted_total(values.reshape(len(values), -1), weights) / len(values)
    return np.asarray(flat.reshape(values.shape[1:]))
