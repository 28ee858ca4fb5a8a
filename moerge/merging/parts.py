"""Steps that several merge methods share. All work on (experts, values) and add experts up in row order.

numpy may change the order of a sum with the shape of the array, so sums over experts are written as loops: the same
bits come out for a block of one value and for a block of a million.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# The decimal density times n can fall just short of a whole number in binary; floor must see the number meant.
ROUNDING = 1e-9


def count_kept(density: float, size: int, *, minimum: int = 1) -> int:
    """How many of `size` values a density keeps: max(minimum, floor(density * size)), never more than there are."""
    return min(size, max(minimum, int(density * size + ROUNDING)))


def keep_largest(values: Array, count: int) -> Mask:
    """Mask of exactly `count` values of largest magnitude, (values,) -> (values,); equal ones by lower index first."""
    if count >= values.size:
        return np.ones(values.shape, dtype=np.bool_)
    if count <= 0:
        return np.zeros(values.shape, dtype=np.bool_)
    magnitudes = np.abs(values)
    threshold = np.partition(magnitudes, values.size - count)[values.size - count]
    mask = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    mask[ties[: count - int(np.count_nonzero(mask))]] = True
    return np.asarray(mask)


def total(values: Array) -> Array:
    """Sum over experts, (experts, values) -> (values,)."""
    result: Array = values[0].copy()
    for row in values[1:]:
        result += row
    return result


def weighted_total(values: Array, weights: Array) -> Array:
    """Sum of weight times values over experts, (experts, values), (experts,) -> (values,)."""
    result: Array = values[0] * values.dtype.type(weights[0])
    product = np.empty_like(result)
    for row, weight in zip(values[1:], weights[1:], strict=True):
        np.multiply(row, values.dtype.type(weight), out=product)
        result += product
    return result


def weight_of(mask: Mask, weights: Array) -> Array:
    """Sum of the weights of the experts in a mask, (experts, values), (experts,) -> (values,)."""
    result = np.zeros(mask.shape[1], dtype=weights.dtype)
    for row, weight in zip(mask, weights, strict=True):
        result += np.multiply(row, weight, dtype=weights.dtype)
    return result


def weigh(values: Array, weights: Array) -> Array:
    """Every expert times its weight, (experts, values), (experts,) -> (experts, values)."""
    return np.asarray(values * np.asarray(weights, dtype=values.dtype)[:, None])


def elect_signs(values: Array, *, by: Literal["total", "frequency"] = "total", zero: int = 1) -> Array:
    """The sign per value that the experts elect: of their sum, or of the sum of their signs. A zero sum gives `zero`.

    (experts, values) -> (values,) of +1, -1 (arXiv 2306.01708, step 2).
    """
    votes = total(values) if by == "total" else total(np.sign(values))
    if zero == 0:
        return np.asarray(np.sign(votes))
    # Comparing and multiplying is six times faster than np.sign and np.where.
    is_minus = votes < 0 if zero > 0 else votes <= 0
    return np.asarray(1 - 2 * is_minus.astype(votes.dtype))


def agree(values: Array, signs: Array) -> Mask:
    """Where an expert has the elected sign; zeros never agree. (experts, values), (values,) -> (experts, values)."""
    mask = np.empty(values.shape, dtype=np.bool_)
    for row, found in zip(values, mask, strict=True):
        np.greater(row * signs, 0, out=found)
    return mask


def divide(numerator: Array, divisor: Array) -> Array:
    """numerator / divisor, and the numerator alone where the divisor is 0."""
    return np.asarray(numerator / (divisor + (divisor == 0)).astype(numerator.dtype, copy=False))


def combine(values: Array, weights: npt.NDArray[np.float64], *, elect: bool, normalize: bool, scale: float) -> Array:
    """The weighted sum of what was left after dropping: (experts, values), (experts,) -> (values,).

    `elect` sums only what agrees with the elected sign of the weighted values, as TIES does; `normalize` divides by the
    weights that were summed.
    """
    weighted = weigh(values, weights)
    divisor: Array = np.asarray(weights.sum())
    if elect:
        agreeing = agree(weighted, elect_signs(weighted))
        weighted *= agreeing
        divisor = weight_of(agreeing, weights)
    merged = total(weighted)
    if normalize:
        merged = divide(merged, divisor.astype(merged.dtype))
    return np.asarray(merged * merged.dtype.type(scale))
