"""Iso-CTS: common directions of the sum and each expert's own ones, all with the same singular value."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, parts
from moerge.merging.base import Parameters, Spec, number, scale

Array = npt.NDArray[Any]

SPEC = Spec(
    name="iso_cts",
    title="Iso-CTS",
    form="core",
    rank_rule="sum",
    summary="Directions common to the sum and directions of each expert alone, all with one singular value.",
    when="As Iso-C with very different tasks, each of which has directions of its own to keep.",
    paper="arXiv 2502.04959",
    parameters=(
        number(
            "common",
            default=0.8,
            minimum=0.0,
            maximum=1.0,
            help="Share of the directions taken from the sum; the rest is split between the experts.",
        ),
        scale(),
    ),
)


def merge(cores: Array, weights: Array, _ranks: tuple[int, ...], parameters: Parameters) -> Array:
    """(experts, rows, columns) -> (rows, columns).

    Only the left common space is taken out of the experts, as published. An expert gives no more directions than its
    residual has, since what LAPACK returns beyond is arbitrary.
    """
    experts = len(cores)
    weighted = parts.weigh(cores.reshape(experts, -1), weights).reshape(cores.shape)
    whole = min(cores.shape[1:])
    U, S, Vt = np.linalg.svd(parts.total(weighted), full_matrices=False)
    common = whole - round((whole - int(whole * parameters.common)) / experts) * experts
    common = min(max(common, 0), whole)
    share = (whole - common) // experts
    left, sizes, right = [], [], []
    for core in weighted:
        own = np.linalg.svd(core - U[:, :common] @ (U[:, :common].T @ core), full_matrices=False)
        kept = min(share, factors.count_above(own[1], factors.NEGLIGIBLE * float(np.linalg.norm(core))))
        left.append(own[0][:, :kept])
        sizes.append(own[1][:kept])
        right.append(own[2][:kept])
    left.append(U[:, :common])
    sizes.append(S[:common])
    right.append(Vt[:common])
    every = np.concatenate(sizes)
    if not every.size:
        return np.zeros(cores.shape[1:])
    polar = factors.polar(np.concatenate(left, axis=1)) @ factors.polar(np.concatenate(right))
    return np.asarray(parameters.scale * every.mean() * polar)


def merge_vectors(values: Array, weights: Array, _parameters: Parameters) -> Array:
    """The weighted mean over experts, (experts, ...) -> (...)."""
    flat = parts.weighted_total(values.reshape(len(values), -1), weights) / len(values)
    return np.asarray(flat.reshape(values.shape[1:]))
