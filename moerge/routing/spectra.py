"""Singular values and the leading direction of a delta, from its factors and without forming it.

With the eigenvectors V and eigenvalues w of B^T B, M = diag(sqrt w) V^T A has the singular values of B A and its right
singular vectors, and M M^T is as small as the rank. Eigenvalues lose what is small beside the largest; where that
matters two thin QR decompositions take their place, at five times the cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.tensors import vectors
from moerge.tensors.kind import Dense, LowRank

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Up to this rank, or this smaller side of a dense delta, all singular values are computed; beyond, the leading ones.
EXACT_RANK = 256
# Eigenvalues below this share of the largest are not known to five digits.
_SOUND = 1e-10
_BLOCK = 32
_MOST_STEPS = 300
_SETTLED = 1e-12


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a delta in falling order, (k,), its leading right singular vector, (d_in,), and |delta|².

    The vector's component of largest magnitude is positive. `is_whole` tells whether `values` holds all that are not
    zero, or the leading ones of a delta of high rank.
    """

    values: Float64
    direction: Float64
    square: float
    is_whole: bool

    @property
    def share(self) -> float:
        """How much of |delta|² lies in the leading direction: 1 for a delta of rank one."""
        return min(1.0, float(self.values[0] ** 2 / self.square))

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of the squared singular values' shares; None where not all of them are known."""
        if not self.is_whole:
            return None
        shares = self.values**2 / np.sum(self.values**2)
        shares = shares[shares > 0]
        return float(np.exp(-np.sum(shares * np.log(shares))))


def of_delta(delta: LowRank | Dense) -> Spectrum | None:
    """The spectrum of a delta; None when it is zero."""
    found = _of_factors(delta) if isinstance(delta, LowRank) else _of_matrix(delta.values)
    if found.values[0] == 0:
        return None
    direction = found.direction / np.linalg.norm(found.direction)
    if direction[np.argmax(np.abs(direction))] < 0:
        direction = -direction
    kept = found.values > max(delta.shape) * np.finfo(np.float64).eps * found.values[0]
    return Spectrum(found.values[kept], direction, found.square, found.is_whole)


def _of_factors(delta: LowRank) -> Spectrum:
    if min(delta.rank, *delta.shape) > EXACT_RANK:
        square = vectors.inner(delta, delta)
        scale = float(delta.scaling)
        return _leading(
            lambda block: scale**2 * (delta.A.T @ (delta.B.T @ (delta.B @ (delta.A @ block)))), delta.shape[1], square
        )
    B, A = delta.B.astype(np.float64), delta.A.astype(np.float64)
    found = _by_eigenvalues(B, A) if len(A) <= min(delta.shape) else None
    values, direction = found or _by_decompositions(B, A)
    values = values * abs(delta.scaling)
    return Spectrum(values, direction, float(values @ values), is_whole=True)


def _by_eigenvalues(B: Float64, A: Float64) -> tuple[Float64, Float64] | None:
    """Singular values and leading right vector of B A; None where the small values would be lost."""
    products = B.T @ B
    sizes = np.sqrt(products.diagonal())
    used = sizes > 0
    if not used.any():
        return np.zeros(1), A[0]
    if not used.all():
        products, sizes, A = products[np.ix_(used, used)], sizes[used], A[used]
    # Columns of B of one length: how the two factors share the size of a rank unit between them means nothing.
    squares, axes = np.linalg.eigh(products / np.outer(sizes, sizes))
    if squares[0] <= _SOUND * squares[-1]:
        return None
    M = (sizes[:, None] * axes * np.sqrt(squares)).T @ A
    squares, left = np.linalg.eigh(M @ M.T)
    if squares[0] <= _SOUND * squares[-1]:
        return None
    return np.sqrt(squares[::-1]), M.T @ left[:, -1]


def _by_decompositions(B: Float64, A: Float64) -> tuple[Float64, Float64]:
    M = _triangle(B) @ A
    left, values, _ = np.linalg.svd(_triangle(M.T).T, full_matrices=False)
    return values, M.T @ left[:, 0]


def _triangle(matrix: Float64) -> Float64:
    """R of its QR decomposition."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _of_matrix(values: Array) -> Spectrum:
    values = values.astype(np.float64)
    if min(values.shape) > EXACT_RANK:
        return _leading(lambda block: values.T @ (values @ block), values.shape[1], float(np.vdot(values, values)))
    _, found, right = np.linalg.svd(values, full_matrices=False)
    return Spectrum(found, right[0], float(found @ found), is_whole=True)


def _leading(apply: Callable[[Float64], Array], size: int, square: float) -> Spectrum:
    """The leading singular values by subspace iteration; `apply` is delta^T delta, (size, block) -> (size, block)."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((size, _BLOCK)))[0]
    known = 0.0
    for _ in range(_MOST_STEPS):
        image = apply(basis)
        squares, axes = np.linalg.eigh(basis.T @ image)
        direction = basis @ axes[:, -1]
        rest = np.linalg.norm(image @ axes[:, -1] - squares[-1] * direction)
        if squares[-1] <= 0 or (rest <= 1e-5 * squares[-1] and abs(squares[-1] - known) <= _SETTLED * squares[-1]):
            break
        known = squares[-1]
        basis = np.linalg.qr(image)[0]
    return Spectrum(np.sqrt(np.maximum(squares[::-1], 0.0)), direction, square, is_whole=False)
