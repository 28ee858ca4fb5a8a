"""Task vectors: what fine-tuning added, per tensor or flat; inner products of low-rank deltas without forming them."""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import numpy as np
import numpy.typing as npt

from moerge.tensors.files import Float32
from moerge.tensors.kind import LowRank

Float64 = npt.NDArray[np.float64]


def inner(x: LowRank, y: LowRank) -> float:
    """Frobenius inner product of two deltas of one shape, in float64: c_x c_y sum((B_x^T B_y) * (A_x A_y^T)).

    Costs rank² · (d_out + d_in) instead of d_out · d_in. Raises ValueError when the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"deltas of shapes {x.shape} and {y.shape} have no inner product")
    bb = x.B.T.astype(np.float64) @ y.B
    aa = x.A.astype(np.float64) @ y.A.T
    return float(x.scaling * y.scaling * np.sum(bb * aa))


def norm(x: LowRank) -> float:
    """Frobenius norm of a delta."""
    return sqrt(max(inner(x, x), 0.0))


def gram(adapters: Sequence[Mapping[str, LowRank]]) -> Float64:
    """Inner products of whole adapters, (adapters, adapters); a module that one of two lacks counts as zero."""
    result = np.zeros((len(adapters), len(adapters)))
    for module in sorted({name for adapter in adapters for name in adapter}):
        having = [(index, adapter[module]) for index, adapter in enumerate(adapters) if module in adapter]
        for position, (i, x) in enumerate(having):
            for j, y in having[position:]:
                result[i, j] += inner(x, y)
    return result + np.triu(result, 1).T


def cosines(products: Float64) -> Float64:
    """A Gram matrix as cosines, (n, n); a zero vector has cosine 0 with all, itself included."""
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    scale = np.outer(norms, norms)
    result: Float64 = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return result


def difference(tuned: Mapping[str, Float32], base: Mapping[str, Float32]) -> dict[str, Float32]:
    """The task vector: tuned minus base per tensor, in float32. Raises ValueError naming a tensor that does not fit."""
    for name in sorted(tuned.keys() | base.keys()):
        if name not in tuned or name not in base or tuned[name].shape != base[name].shape:
            raise ValueError(f"{name} is not in both models with one shape")
    return {name: np.asarray(tuned[name], np.float32) - np.asarray(base[name], np.float32) for name in sorted(tuned)}


def flatten(vector: Mapping[str, Float32]) -> Float32:
    """All tensors of a task vector as one, in the order of their sorted names."""
    return np.concatenate([np.ravel(vector[name]) for name in sorted(vector)] or [np.zeros(0, np.float32)])


def cut(flat: Float32, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float32]:
    """The inverse of `flatten`, given the shapes. Raises ValueError when the number of values differs."""
    sizes = {name: prod(shapes[name]) for name in sorted(shapes)}
    if flat.ndim != 1 or flat.size != sum(sizes.values()):
        raise ValueError(f"{flat.size} values do not fill tensors of {sum(sizes.values())}")
    ends = np.cumsum(list(sizes.values()))
    return {
        name: flat[end - size : end].reshape(shapes[name])
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
