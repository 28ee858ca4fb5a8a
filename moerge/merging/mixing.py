"""Sums of deltas whose coefficients follow from the deltas' inner products: what methods on a sphere need.

Inner products of factors come from their small Gram matrices, and a sum of factors is their stack, so that a dense
delta is never formed where all experts have factors.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging import factors
from moerge.merging.sources import Delta, Factors, Held, Stored, delta_dtype

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Values that are read in float64 at a time.
_STEP = 1 << 16
# Below this share of what they could be, directions that were added up have cancelled.
_CANCELLED = 1e-6
# A cosine in float64 says no more of smaller angles, whose sine would divide.
_PARALLEL = 1e-6
# Coefficients that leave a single delta as it is.
ONE = np.ones(1)


def products(deltas: Sequence[Held | None]) -> Float64:
    """Inner products of deltas of one tensor, (experts, experts) in float64; None is a zero delta."""
    present = [position for position, delta in enumerate(deltas) if delta is not None]
    found = [delta for delta in deltas if delta is not None]
    result = np.zeros((len(deltas), len(deltas)))
    if all(isinstance(delta, Factors) for delta in found):
        result[np.ix_(present, present)] = _of_factors(cast("list[Factors]", found))
        return result
    flat = [delta if isinstance(delta, Stored) else _dense(delta).ravel() for delta in found]
    small = np.zeros((len(found), len(found)))
    for start, stop in _stretches(found[0].shape):
        part = np.stack([_stretch(row, start, stop).astype(np.float64) for row in flat])
        small += part @ part.T
    result[np.ix_(present, present)] = small
    return result


def line_products(deltas: Sequence[Held | None], *, axis: int) -> Float64:
    """Inner products of each row (axis 1) or column (axis 0) of deltas of one matrix, (experts, experts, lines)."""
    lines = next(delta.shape[1 - axis] for delta in deltas if delta is not None)
    result = np.zeros((len(deltas), len(deltas), lines))
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas[: i + 1]):
            if one is not None and other is not None:
                result[i, j] = result[j, i] = _lines(one, other, axis=axis)
    return result


def total(deltas: Sequence[Held | None], coefficients: Array) -> Delta:
    """Sum of coefficient times delta: factors where all deltas are factors, else dense.

    `coefficients` are (experts,), or (experts, rows, 1) or (experts, 1, columns) for one per line of a matrix.
    """
    kept = [(delta, value) for delta, value in zip(deltas, coefficients, strict=True) if delta is not None]
    if all(isinstance(delta, Factors) for delta, _ in kept):
        items = cast("list[tuple[Factors, Any]]", kept)
        if coefficients.ndim == 1:
            return factors.stack([item for item, _ in items], [value for _, value in items])
        return factors.stack([_scaled(item, value) for item, value in items], [1.0] * len(items))
    dtype = np.result_type(*(delta_dtype(delta) for delta, _ in kept))
    result = np.zeros(kept[0][0].shape, dtype=dtype)
    for delta, value in kept:
        factor = np.asarray(value, dtype=dtype)
        if isinstance(delta, Stored) and factor.ndim == 0:
            flat = result.reshape(-1)
            for start, stop in _stretches(delta.shape):
                flat[start:stop] += _stretch(delta, start, stop) * factor
        else:
            result += _dense(delta) * factor
    return result


def shares(weights: Float64, *, name: str) -> Float64:
    """Weights divided by their sum. Raises ExpertsIncompatible when those that take part in a tensor cancel."""
    whole = weights.sum()
    if abs(whole) < 1e-8:
        raise ExpertsIncompatible(
            f"The weights of the experts that have {name} sum to {whole:g}.",
            pointer="/experts",
            met=float(whole),
            wanted="weights whose sum is not zero",
            remedy="Change the weights, or set missing to zero.",
        )
    return np.asarray(weights / whole)


def lengths(inner: Float64) -> Float64:
    """Norms from inner products, (experts, experts, ...) -> (experts, ...)."""
    return np.asarray(np.sqrt(np.maximum(np.einsum("ii...->i...", inner), 0.0)))


def mean_direction(inner: Float64, weights: Float64, *, name: str) -> Float64:
    """Coefficients of the unit vector along the weighted sum of the deltas' directions, (experts,).

    Zero deltas have no direction and get 0; all are 0 where there is none. Raises ExpertsIncompatible when the
    directions cancel.
    """
    sizes = lengths(inner)
    shares = np.divide(weights, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    wanted = float(np.abs(weights[sizes > 0]).sum())
    if wanted == 0:
        return shares
    size = math.sqrt(max(float(shares @ inner @ shares), 0.0))
    if size <= _CANCELLED * wanted:
        raise ExpertsIncompatible(
            f"The directions of {name} cancel, so their mean has none.",
            pointer="/experts",
            met="deltas that point away from each other",
            wanted="deltas whose weighted directions do not add up to zero",
            remedy="Change the weights, or use linear.",
        )
    return np.asarray(shares / size)


def between(inner: Float64, share: float, *, parallel: float) -> Float64:
    """Coefficients of spherical interpolation between two deltas, (2, 2, ...) -> (2, ...).

    The sines are those of the angle between the directions and apply to the deltas at their own lengths. Where the
    cosine is beyond +-`parallel`, or one of them is as good as zero, the interpolation is along the straight line.
    """
    sizes = lengths(inner)
    is_zero = sizes.min(axis=0) <= 1e-8 * sizes.max(axis=0)
    cosine: Float64 = np.clip(inner[0, 1] / np.where(is_zero, 1.0, sizes[0] * sizes[1]), -1.0, 1.0)
    angle: Float64 = np.arccos(cosine)
    is_line = is_zero | (np.abs(cosine) > parallel) | (np.sin(angle) < _PARALLEL)
    sine: Float64 = np.where(is_line, 1.0, np.sin(angle))
    return np.stack(
        [
            np.where(is_line, 1.0 - share, np.sin((1.0 - share) * angle) / sine),
            np.where(is_line, share, np.sin(share * angle) / sine),
        ]
    )


def _of_factors(items: Sequence[Factors]) -> Float64:
    """<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)), from the Gram matrices of all factors side by side."""
    B = np.concatenate([item.B for item in items], axis=1).astype(np.float64)
    A = np.concatenate([item.A for item in items]).astype(np.float64)
    both = (B.T @ B) * (A @ A.T)
    starts = np.cumsum([0, *(item.rank for item in items[:-1])])
    found = np.add.reduceat(np.add.reduceat(both, starts, axis=0), starts, axis=1)
    return np.asarray((found + found.T) / 2)


def _lines(one: Held, other: Held, *, axis: int) -> Float64:
    if isinstance(one, Factors) and isinstance(other, Factors):
        B, A = one.B.astype(np.float64), one.A.astype(np.float64)
        if axis == 1:
            return np.asarray(np.einsum("ij,ij->i", B @ (A @ other.A.T), other.B))
        return np.asarray(np.einsum("ij,ij->j", (B.T @ other.B).T @ A, other.A))
    names = "ij,ij->i" if axis == 1 else "ij,ij->j"
    return np.asarray(np.einsum(names, _dense(one).astype(np.float64), _dense(other).astype(np.float64)))


def _scaled(item: Factors, values: Array) -> Factors:
    """Each row of the delta times its own factor, values (rows, 1); or each column, values (1, columns)."""
    values = values.astype(item.B.dtype)
    return Factors(item.B * values, item.A) if values.shape[1] == 1 else Factors(item.B, item.A * values)


def _dense(delta: Held) -> Array:
    if isinstance(delta, Stored):
        return _stretch(delta, 0, math.prod(delta.shape)).reshape(delta.shape)
    return delta.delta() if isinstance(delta, Factors) else delta


def _stretches(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last value of each stretch of a flattened delta."""
    size = math.prod(shape)
    return [(start, min(start + _STEP, size)) for start in range(0, size, _STEP)]


def _stretch(flat: Array | Stored, start: int, stop: int) -> Array:
    if isinstance(flat, Stored):
        return flat.read(start, stop, out=np.empty(stop - start, dtype=np.float32))
    return flat[start:stop]
