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
from moerge.merging.base import choice, number
from moerge.merging.statistics import Gram

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

OFF_DIAGONAL = number(
    "off_diagonal",
    default=0.9,
    minimum=0.0,
    maximum=1.0,
    help="Factor on the off-diagonal values of every Gram matrix.",
)
FALLBACK = choice(
    "fallback",
    ["refuse", "mean"],
    default="refuse",
    help="What becomes of a matrix for which an expert has no Gram matrix: a refusal, or the mean.",
)
# Share of the mean diagonal that is added where a sum of Gram matrices cannot be factorised.
RIDGE = 1e-6
# Pivots below this share of the mean diagonal are rounding, not curvature.
_SMALLEST_PIVOT = 1e-13
_PANEL = 128
_COLUMNS = 512


@dataclass(frozen=True, eq=False)
class Total:
    """sum_t w_t G~_t: a dense matrix, or `vectors.T vectors + diag(diagonal)`, vectors (k, d), where dense is None."""

    diagonal: Float64
    vectors: Array
    dense: Float64 | None

    def times(self, rows: Float64) -> Float64:
        """rows @ total, (r, d) -> (r, d)."""
        if self.dense is not None:
            return np.asarray(rows @ self.dense)
        few = rows.astype(self.vectors.dtype, copy=False) @ self.vectors.T
        return np.asarray(few @ self.vectors + rows * self.diagonal)

    def solve(self, rows: Float64, *, name: str) -> Float64:
        """rows @ total^-1, (r, d) -> (r, d). Raises ExpertsIncompatible when no small ridge makes it positive."""
        if self.dense is not None:
            return np.asarray(_solve_factored(_factored(self.dense, name=name), rows.T).T)
        inner = np.eye(len(self.vectors))
        roots = np.sqrt(self.diagonal)
        for start in range(0, self.diagonal.size, _COLUMNS):
            part = self.vectors[:, start : start + _COLUMNS]
            part = part / roots[start : start + _COLUMNS].astype(part.dtype)
            # A matrix times its own transpose takes half the work.
            inner += part @ part.T
        _factor(inner)
        scaled = rows / self.diagonal
        few: Float64 = (self.vectors @ scaled.T.astype(self.vectors.dtype, copy=False)).astype(np.float64)
        found = _solve_factored(inner, few).T.astype(self.vectors.dtype, copy=False)
        del inner
        for start in range(0, self.diagonal.size, _COLUMNS):
            stop = start + _COLUMNS
            scaled[:, start:stop] -= (found @ self.vectors[:, start:stop]) / self.diagonal[start:stop]
        return np.asarray(scaled)


def times(rows: Float64, gram: Any, *, shrink: float) -> Float64:
    """rows @ G~ of one expert, (r, d) -> (r, d)."""
    return total([gram], [1.0], shrink=shrink).times(rows)


def total(grams: Sequence[Any], weights: Sequence[float] | Float64, *, shrink: float) -> Total:
    """The weighted sum of several experts' Gram matrices with off-diagonals times `shrink`.

    Directions are kept in float32 unless they come in float64.
    """
    size = grams[0].shape[0]
    few = [gram for gram in grams if isinstance(gram, Gram)]
    if len(few) == len(grams) and sum(gram.values.size for gram in few) < size:
        diagonal = np.zeros(size)
        for gram, weight in zip(few, weights, strict=True):
            diagonal += weight * (shrink * gram.rest.astype(np.float64) + (1 - shrink) * gram.diagonal())
        # Values below zero have no root, and a diagonal of zero no inverse; then the matrix itself is formed.
        if (diagonal > 0).all() and all(
            (weight * gram.values >= 0).all() for gram, weight in zip(few, weights, strict=True)
        ):
            roots = [
                np.sqrt(shrink * weight * gram.values.astype(np.float64))
                for gram, weight in zip(few, weights, strict=True)
            ]
            dtype = np.result_type(np.float32, *(gram.vectors.dtype for gram in few))
            vectors = np.empty((sum(root.size for root in roots), size), dtype=dtype)
            start = 0
            for gram, root in zip(few, roots, strict=True):
                np.multiply(gram.vectors, root[:, None].astype(dtype), out=vectors[start : start + root.size])
                start += root.size
            return Total(diagonal, vectors, None)
    dense = np.zeros((size, size))
    for gram, weight in zip(grams, weights, strict=True):
        found = gram.dense() if isinstance(gram, Gram) else np.array(gram, dtype=np.float64)
        own = found.diagonal().copy()
        found *= weight * shrink
        np.fill_diagonal(found, weight * own)
        dense += found
    return Total(dense.diagonal().copy(), np.zeros((0, size)), dense)


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


def _factor(matrix: Float64) -> None:
    """Put the Cholesky factor of a positive definite matrix into its lower triangle, panel by panel in place."""
    for start in range(0, len(matrix), _PANEL):
        stop = start + _PANEL
        L = matrix[start:stop, start:stop] = np.linalg.cholesky(matrix[start:stop, start:stop])
        below = matrix[stop:, start:stop] = np.linalg.solve(L, matrix[stop:, start:stop].T).T
        for row in range(0, len(below), _PANEL):
            last = row + _PANEL
            matrix[stop + row : stop + last, stop : stop + last] -= below[row:last] @ below[:last].T


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
