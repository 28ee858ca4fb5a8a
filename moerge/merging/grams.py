"""Sums of Gram matrices as linear maps: products with rows, and rows solved against them, without an inverse.

Off-diagonal values are shrunk first, G~ = a G + (1 - a) diag(G). Where every Gram comes as few directions and a
diagonal, no d x d matrix is formed: the sum is one too, and is solved by the Woodbury identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging.statistics import Gram

Float64 = npt.NDArray[np.float64]

# Share of the mean diagonal that is added where a sum of Gram matrices cannot be factorised.
RIDGE = 1e-6
# Pivots below this share of the mean diagonal are rounding, not curvature.
_SMALLEST_PIVOT = 1e-13
_PANEL = 128


@dataclass(frozen=True, eq=False)
class Total:
    """sum_t w_t G~_t: a dense matrix, or `vectors.T diag(values) vectors + diag(diagonal)` where dense is None."""

    diagonal: Float64
    vectors: Float64
    values: Float64
    dense: Float64 | None

    def times(self, rows: Float64) -> Float64:
        """rows @ total, (r, d) -> (r, d)."""
        if self.dense is not None:
            return np.asarray(rows @ self.dense)
        return np.asarray(((rows @ self.vectors.T) * self.values) @ self.vectors + rows * self.diagonal)

    def solve(self, rows: Float64, *, name: str) -> Float64:
        """rows @ total^-1, (r, d) -> (r, d). Raises ExpertsIncompatible when no small ridge makes it positive."""
        if self.dense is None:
            scaled = rows / self.diagonal
            U = self.vectors * np.sqrt(self.values)[:, None]
            L = np.asarray(np.linalg.cholesky(np.eye(len(U)) + (U / self.diagonal) @ U.T), dtype=np.float64)
            taken: Float64 = _solve_factored(L, np.asarray(U @ scaled.T)).T @ U / self.diagonal
            return np.asarray(scaled - taken)
        return np.asarray(_solve_factored(_factored(self.dense, name=name), rows.T).T)


def times(rows: Float64, gram: Any, *, shrink: float) -> Float64:
    """rows @ G~ of one expert, (r, d) -> (r, d)."""
    return total([gram], [1.0], shrink=shrink).times(rows)


def total(grams: Sequence[Any], weights: Sequence[float] | Float64, *, shrink: float) -> Total:
    """The weighted sum of several experts' Gram matrices with off-diagonals times `shrink`."""
    size = grams[0].shape[0]
    few = [gram for gram in grams if isinstance(gram, Gram)]
    diagonal = np.zeros(size)
    if len(few) == len(grams) and sum(gram.values.size for gram in few) < size:
        for gram, weight in zip(few, weights, strict=True):
            diagonal += weight * (shrink * gram.rest.astype(np.float64) + (1 - shrink) * gram.diagonal())
        vectors = np.concatenate([gram.vectors.astype(np.float64) for gram in few])
        values = np.concatenate(
            [shrink * weight * gram.values.astype(np.float64) for gram, weight in zip(few, weights, strict=True)]
        )
        if (diagonal > 0).all() and (values >= 0).all():
            return Total(diagonal, vectors, values, None)
    dense = np.zeros((size, size))
    for gram, weight in zip(grams, weights, strict=True):
        found = gram.dense() if isinstance(gram, Gram) else gram.astype(np.float64)
        diagonal = found.diagonal().copy()
        found = found * (weight * shrink)
        np.fill_diagonal(found, weight * diagonal)
        dense += found
    return Total(dense.diagonal().copy(), np.zeros((0, size)), np.zeros(0), dense)


def _factored(matrix: Float64, *, name: str) -> Float64:
    """The Cholesky factor of a matrix, or of it with a small ridge."""
    mean = float(matrix.trace()) / len(matrix)
    for ridge in (0.0, RIDGE * mean):
        try:
            L = np.linalg.cholesky(matrix + ridge * np.eye(len(matrix)) if ridge else matrix)
        except np.linalg.LinAlgError:
            continue
        if float(np.square(L.diagonal()).min()) > _SMALLEST_PIVOT * mean:
            return np.asarray(L)
    raise not_positive(name)


def not_positive(name: str) -> ExpertsIncompatible:
    """The refusal of a weighted sum of Gram matrices that has no unique solution."""
    return ExpertsIncompatible(
        f"The weighted sum of the Gram matrices of {name} is not positive definite.",
        pointer="/experts",
        met="Gram matrices or weights below zero",
        wanted="a positive definite sum",
        remedy="Use weights above zero, or gather the Gram matrices on more examples.",
    )


def _solve_factored(L: Float64, columns: Float64) -> Float64:
    """(L L^T)^-1 columns, panel by panel."""
    found = columns.copy()
    starts = range(0, len(L), _PANEL)
    for start in starts:
        stop = start + _PANEL
        found[start:stop] = np.linalg.solve(
            L[start:stop, start:stop], found[start:stop] - L[start:stop, :start] @ found[:start]
        )
    for start in reversed(starts):
        stop = start + _PANEL
        found[start:stop] = np.linalg.solve(
            L[start:stop, start:stop].T, found[start:stop] - L[stop:, start:stop].T @ found[stop:]
        )
    return found
