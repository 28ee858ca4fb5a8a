"""How alike experts are before they are merged: cosine, correlation, distance and sign conflict of each pair's deltas.

Model kinship (arXiv 2410.12613) takes the first three over all values of two deltas as one vector. The released code
loses the sign of the cosine; here it keeps it. All but the conflict come from small Gram matrices where experts have
factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging import engine, mixing
from moerge.merging.sources import Block, Delta, Factors, Given, Source, Stream

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Kinship:
    """Per pair of experts, (experts, experts) in the order given; a module that one of two lacks is a zero delta.

    `cosine` and `pearson` lie in -1 .. 1 and are 0 where they are not defined; `distance` is Euclidean. `conflict` is
    the share of values with opposite signs among those that both change, 0 where there are none.
    """

    cosine: Float64
    pearson: Float64
    distance: Float64
    conflict: Float64


@dataclass(frozen=True, eq=False)
class _Sums:
    """What is added up over tensors: inner products, sums of values, their number, and values that both change."""

    inner: Float64
    values: Float64
    size: int
    opposed: Float64
    shared: Float64


def measure(experts: Sequence[Mapping[str, Given]], *, threads: int = 1) -> Kinship:
    """Compare deltas by tensor name: arrays, or LowRank records. Raises ExpertsIncompatible when shapes differ."""
    if not experts:
        raise ExpertsIncompatible(
            "There are no experts to compare.", pointer="/experts", met=0, wanted="at least 1", remedy="Name an expert."
        )
    sources = tuple(Source(f"expert {i}", 1.0, tensors) for i, tensors in enumerate(experts))
    stream = Stream(sources, threads=threads)
    with engine.one_blas_thread():
        found = [_of_tensor(stream, name) for name in stream.names if stream.size(name)]
    count = len(experts)
    inner, opposed, shared = (
        sum((getattr(part, kind) for part in found), np.zeros((count, count)))
        for kind in ("inner", "opposed", "shared")
    )
    values = sum((part.values for part in found), np.zeros(count))
    centred = inner - np.outer(values, values) / max(1, sum(part.size for part in found))
    squares = np.diag(inner)
    return Kinship(
        cosine=_normalised(inner, squares),
        pearson=_normalised(centred, squares),
        distance=np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * inner, 0.0)),
        conflict=np.divide(opposed, shared, out=np.zeros_like(opposed), where=shared > 0),
    )


def _of_tensor(stream: Stream, name: str) -> _Sums:
    deltas = stream.deltas(name)
    pairs = [counts for _, counts in stream.over_blocks(name, _count)]
    opposed, shared = (sum((pair[i] for pair in pairs), np.zeros((len(deltas),) * 2)) for i in (0, 1))
    sums = np.array([0.0 if delta is None else _sum(delta) for delta in deltas])
    return _Sums(mixing.products(deltas), sums, stream.size(name), opposed, shared)


def _count(block: Block) -> tuple[Float64, Float64]:
    """How many values of each pair have opposite signs, and how many are not zero in both."""
    above, below = (block.values > 0).astype(np.float32), (block.values < 0).astype(np.float32)
    changed = above + below
    crossed = (above @ below.T).astype(np.float64)
    return crossed + crossed.T, (changed @ changed.T).astype(np.float64)


def _sum(delta: Delta) -> float:
    """Sum of all values; of factors 1^T B A 1."""
    if isinstance(delta, Factors):
        return float(delta.B.astype(np.float64).sum(axis=0) @ delta.A.astype(np.float64).sum(axis=1))
    return float(delta.sum(dtype=np.float64))


def _normalised(products: Float64, squares: npt.NDArray[Any]) -> Float64:
    """Products over the roots of their diagonal; 0 where a vector is zero but for the rounding of its `squares`."""
    own = np.diag(products)
    sizes = np.sqrt(np.where(own > 1e-14 * squares, own, 0.0))
    scale = np.outer(sizes, sizes)
    shares = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.asarray(np.clip(shares, -1.0, 1.0))
