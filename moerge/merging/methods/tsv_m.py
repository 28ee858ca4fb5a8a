"""TSV-M: the experts' leading singular directions side by side, made orthogonal to each other."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, parts
from moerge.merging.base import Parameters, Spec, scale

Array = npt.NDArray[Any]

SPEC = Spec(
    name="tsv_m",
    title="TSV-M",
    form="core",
    rank_rule="sum",
    summary="Leading singular directions of every expert, decorrelated so that they interfere less.",
    when="Many LoRA experts of different tasks; the result stays low rank, exactly.",
    paper="arXiv 2412.00081",
    version=2,
    parameters=(scale(),),
)


def merge(cores: Array, weights: Array, ranks: tuple[int, ...], parameters: Parameters) -> Array:
    """scale * polar(U) diag(S) polar(V) of the stacked singular triplets, (experts, rows, columns) -> (rows, columns).

    An expert of rank r gives r triplets; a full-rank one gives min(rows, columns) / experts, as published. Nobody gives
    directions in which nothing lies, since what LAPACK returns there is arbitrary.
    """
    share = min(cores.shape[1:]) // len(cores)
    left, sizes, right = [], [], []
    for core, weight, rank in zip(cores, weights, ranks, strict=True):
        U, S, Vt = np.linalg.svd(core * weight, full_matrices=False)
        kept = min(rank or share, factors.count_above(S, factors.NEGLIGIBLE * S.max(initial=0.0)))
        left.append(U[:, :kept])
        sizes.append(S[:kept])
        right.append(Vt[:kept])
    if not any(found.size for found in sizes):
        return np.zeros(cores.shape[1:])
    U_polar, V_polar = factors.polar(np.concatenate(left, axis=1)), factors.polar(np.concatenate(right))
    return np.asarray(parameters.scale * (U_polar * np.concatenate(sizes)) @ V_polar)


def merge_vectors(values: Array, weights: Array, _parameters: Parameters) -> Array:
    """The weighted mean over experts, (experts, ...) -> (...)."""
    flat = parts.weighted_total(values.reshape(len(values), -1), weights) / len(values)
    return np.asarray(flat.reshape(values.shape[1:]))
