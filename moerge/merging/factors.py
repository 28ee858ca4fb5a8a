"""Deltas as factors: exact sums, truncation to a rank, and the small cores that spectral methods work on.

Nothing here forms a d_out x d_in matrix except where a dense one is handed in. Everything small is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import noise
from moerge.merging.sources import Delta, Factors

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Directions below this share of the largest carry nothing but rounding.
NEGLIGIBLE = 1e-6
# Up to this many rows or columns an exact SVD of a dense delta takes milliseconds.
EXACT_SIDE = 256
_BLOCKS = 4
_PANEL_ROWS = 512
_GRAM_ROWS = 1024
# A Gram matrix squares the condition: with eigenvalues down to this share of the largest float64 leaves six digits on
# the weakest direction.
_SAFE = 1e-10
# Cores are worked on further, so their bases keep eight digits.
_SAFE_CORE = 1e-8
# Squared singular values below this share of the largest are rounding of their Gram matrix.
_NOTHING = 1e-15


@dataclass(frozen=True)
class Truncated:
    """Factors of a given rank, and how much of the squared Frobenius norm they keep.

    `sizes` are the squared singular values that came to light on the way, largest first: all of them, or the leading
    ones of a large dense delta; none where nothing was cut.
    """

    factors: Factors
    kept: float
    whole: float
    sizes: Float64 = field(default_factory=lambda: np.empty(0))

    @property
    def share(self) -> float:
        """Kept over whole, 1 for a zero delta."""
        return min(1.0, self.kept / self.whole) if self.whole > 0 else 1.0


def fit(delta: Delta, rank: int, *, name: str) -> Truncated:
    """A merged delta at a rank; factors that have no more are left as they are.

    `name` seeds the randomised SVD, so that equal deltas of equal names give equal factors.
    """
    if not isinstance(delta, Factors):
        return truncate_dense(delta, rank, key=noise.key(0, "svd", name))
    if delta.rank > rank:
        return truncate(delta, rank)
    whole = square_norm_of(delta)
    return Truncated(delta, whole, whole)


def stack(items: Sequence[Factors], coefficients: Sequence[float] | Array) -> Factors:
    """sum coefficient_t B_t A_t as one pair of factors of rank sum r_t; exact. Coefficients go into A."""
    dtype = np.result_type(*(array.dtype for item in items for array in item))
    scaled = [item.A * dtype.type(value) for item, value in zip(items, coefficients, strict=True)]
    return Factors(
        np.concatenate([item.B for item in items], axis=1).astype(dtype, copy=False),
        np.concatenate(scaled).astype(dtype, copy=False),
    )


def weighted_sum(deltas: Sequence[Delta | None], coefficients: Sequence[float] | Array) -> Delta:
    """sum coefficient_t D_t, as factors where all have factors; None stands for a delta of zero."""
    present = [(delta, value) for delta, value in zip(deltas, coefficients, strict=True) if delta is not None]
    low = [delta for delta, _ in present if isinstance(delta, Factors)]
    if len(low) == len(present):
        return stack(low, [value for _, value in present])
    return np.asarray(sum(dense(delta) * np.float64(value) for delta, value in present))


def dense(delta: Delta) -> Array:
    """A delta as an array."""
    return delta.delta() if isinstance(delta, Factors) else delta


def truncate(factors: Factors, rank: int) -> Truncated:
    """The closest delta of at most `rank` to B @ A, balanced between both factors."""
    found = None
    if factors.rank <= min(factors.shape):
        found = _by_grams(_gram(factors.B), _gram(factors.A.T), rank)
    if found is None:
        return _by_bases(factors, rank)
    return Truncated(
        _recombined(factors, found.left, found.right, dtype=np.result_type(*factors)),
        float(found.squares[:rank].sum()),
        float(found.squares.sum()),
        found.squares,
    )


@dataclass(frozen=True)
class _Turned:
    """B @ left and (A^T @ right)^T are the leading singular directions of B @ A, each times the root of its value.

    `squares` are all squared singular values, falling.
    """

    left: Float64
    right: Float64
    squares: Float64


def _by_grams(left: Float64, right: Float64, rank: int) -> _Turned | None:
    """The leading directions of B @ A from B^T B and A A^T alone, or None where float64 is too coarse for that.

    With B^T B = L L^T the left directions are B L^-T u for the eigenvectors u of L^T A A^T L, whose eigenvalues are the
    squared singular values. The right ones are the left ones seen through B @ A, so the product is a projection of it.
    """
    gauge = _gauge(left.diagonal(), right.diagonal())
    scales = np.outer(gauge, gauge)
    half = _half(left * scales, condition=1 / _SAFE)
    if half is None:
        return None
    squares, vectors = np.linalg.eigh(half.core.T @ (right / scales) @ half.core)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1][:, :rank]
    if squares[:rank][-1] <= _SAFE * squares[0]:
        return None
    root = np.sqrt(np.sqrt(squares[:rank]))
    return _Turned(
        gauge[:, None] * (half.inverse.T @ (vectors * root)),
        (half.core @ (vectors / root)) / gauge[:, None],
        squares,
    )


@dataclass(frozen=True)
class _Half:
    """The Cholesky factor L of a Gram matrix and its inverse: columns @ inverse.T are orthonormal."""

    core: Float64
    inverse: Float64


def _half(gram: Float64, *, condition: float) -> _Half | None:
    """L of gram = L L^T, or None where the condition of the matrix may exceed the given one."""
    try:
        L = np.asarray(np.linalg.cholesky(gram), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    inverse = np.asarray(np.linalg.inv(L), dtype=np.float64)
    # The trace bounds the largest eigenvalue, and that of the inverse matrix the smallest one.
    is_safe = float(gram.trace()) * float(np.square(inverse).sum()) < condition
    return _Half(L, inverse) if is_safe else None


def _gram(columns: Array) -> Float64:
    """columns^T columns, (d, R) -> (R, R), in float64 without a copy of it all."""
    total = np.zeros((columns.shape[1], columns.shape[1]))
    for start in range(0, len(columns), _GRAM_ROWS):
        panel = columns[start : start + _GRAM_ROWS].astype(np.float64)
        total += panel.T @ panel
    return total


def _recombined(factors: Factors, left: Float64, right: Float64, *, dtype: np.dtype[Any]) -> Factors:
    """(B @ left, right^T @ A), each value computed in float64 and rounded once."""
    B = np.empty((len(factors.B), left.shape[1]), dtype=dtype)
    A = np.empty((right.shape[1], factors.A.shape[1]), dtype=dtype)
    for whole, mapping, found in ((factors.B, left, B), (factors.A.T, right, A.T)):
        for start in range(0, len(whole), _PANEL_ROWS):
            found[start : start + _PANEL_ROWS] = whole[start : start + _PANEL_ROWS].astype(np.float64) @ mapping
    return Factors(B, A)


def _by_bases(factors: Factors, rank: int) -> Truncated:
    """The closest delta by Householder QR of both factors and an SVD of the R x R core, whatever their condition."""
    B, A = factors
    # The same delta with each column of B as long as its row of A: experts whose B is tiny and whose A is huge, or the
    # other way round, then lose nothing.
    gauge = _gauge(
        np.einsum("ij,ij->j", B, B, dtype=np.float64),
        np.einsum("ij,ij->i", A, A, dtype=np.float64),
    )
    Q_B, R_B = np.linalg.qr(B * gauge)
    Q_A, R_A = np.linalg.qr((A / gauge[:, None]).T)
    U, S, Vt = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    rank = min(rank, S.size)
    root = np.sqrt(S[:rank])
    found = _recombined(Factors(Q_B, Q_A.T), U[:, :rank] * root, Vt[:rank].T * root, dtype=np.result_type(*factors))
    return Truncated(found, float(S[:rank] @ S[:rank]), float(S @ S), S * S)


def _gauge(left: Float64, right: Float64) -> Float64:
    """Factors that bring columns of squared lengths `left` and rows of squared lengths `right` to one length."""
    is_zero = (left == 0) | (right == 0)
    return np.asarray(
        np.where(is_zero, 1.0, np.sqrt(np.sqrt(np.where(is_zero, 1.0, right) / np.where(is_zero, 1.0, left))))
    )


def truncate_dense(delta: Array, rank: int, *, key: tuple[int, int]) -> Truncated:
    """The closest delta of at most `rank` to a dense matrix.

    Exact for small matrices, else the best within a randomised block Krylov space of 4 blocks of `rank` directions
    (Musco, Musco, arXiv 1504.05477): about 0.02 % above the smallest possible error on merged deltas. `key` fixes the
    random directions.
    """
    rows, columns = delta.shape
    if min(rows, columns) <= max(EXACT_SIDE, 2 * rank):
        U, S, Vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        return _balanced(U, S, Vt, rank=rank, dtype=delta.dtype)
    basis = np.linalg.qr(_times(delta, noise.signs(key, (columns, rank))))[0]
    for _ in range(min(_BLOCKS, min(rows, columns) // rank) - 1):
        inputs = np.linalg.qr(_transposed_times(basis[:, -rank:], delta).T)[0]
        found = _times(delta, inputs)
        found -= basis @ (basis.T @ found)
        basis = np.concatenate([basis, np.linalg.qr(found)[0]], axis=1)
    # What earlier blocks already hold is taken out of later ones only up to rounding.
    basis = np.linalg.qr(basis)[0]
    seen = Factors(basis, _transposed_times(basis, delta))
    squares, vectors = np.linalg.eigh(_gram(seen.A.T))
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1][:, :rank]
    root = np.sqrt(np.sqrt(squares[:rank]))
    inverse = np.where(squares[:rank] > _NOTHING * squares[0], 1 / np.where(root > 0, root, 1.0), 0.0)
    factors = _recombined(seen, vectors * root, vectors * inverse, dtype=delta.dtype)
    return Truncated(factors, float(squares[:rank].sum()), square_norm(delta), squares)


def square_norm(values: Array) -> float:
    """Squared Frobenius norm, added up in float64 row by row."""
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, (1 << 16) // max(1, rows.shape[1]))
    return sum(
        float(np.einsum("ij,ij->", part, part))
        for start in range(0, len(rows), step)
        for part in [rows[start : start + step].astype(np.float64)]
    )


def square_norm_of(found: Factors) -> float:
    """Squared Frobenius norm of B @ A from the two small Gram matrices."""
    left, right = found.B.astype(np.float64), found.A.astype(np.float64)
    return max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))


def _balanced(U: Float64, S: Float64, Vt: Float64, *, rank: int, dtype: np.dtype[Any]) -> Truncated:
    rank = min(rank, S.size)
    root = np.sqrt(S[:rank])
    factors = Factors(
        np.ascontiguousarray((U[:, :rank] * root).astype(dtype)),
        np.ascontiguousarray((root[:, None] * Vt[:rank]).astype(dtype)),
    )
    return Truncated(factors, float(S[:rank] @ S[:rank]), float(S @ S), S * S)


def _times(delta: Array, right: Array) -> Array:
    """delta @ right, panel by panel, so that the rounding does not depend on how many threads BLAS has at hand."""
    right = right.astype(delta.dtype, copy=False)
    return np.concatenate(
        [delta[start : start + _PANEL_ROWS] @ right for start in range(0, delta.shape[0], _PANEL_ROWS)]
    )


def _transposed_times(left: Array, delta: Array) -> Array:
    """left.T @ delta, added up over the same panels."""
    left = np.ascontiguousarray(left.T)
    total = np.zeros((left.shape[0], delta.shape[1]), dtype=delta.dtype)
    for start in range(0, delta.shape[0], _PANEL_ROWS):
        total += left[:, start : start + _PANEL_ROWS] @ delta[start : start + _PANEL_ROWS]
    return total


def count_above(sizes: Array, floor: float) -> int:
    """How many singular values are larger than a floor."""
    return int(np.count_nonzero(sizes > floor))


def polar(matrix: Float64) -> Float64:
    """The closest matrix with orthonormal rows or columns: U V^T of the SVD, on what is not negligible."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    rank = count_above(S, NEGLIGIBLE * S.max(initial=0.0))
    return np.asarray(U[:, :rank] @ Vt[:rank])


@dataclass(frozen=True)
class Cores:
    """Deltas in the bases their factors span together: delta_t = (B @ left) @ cores[t] @ (A^T @ right)^T.

    B (d_out, R) and A (R, d_in) are the factors side by side, or already orthonormal; B @ left and A^T @ right have
    orthonormal columns.
    """

    factors: Factors
    left: Float64
    cores: Float64
    right: Float64
    ranks: tuple[int, ...]

    def expand(self, core: Float64, dtype: npt.DTypeLike = np.float64) -> Factors:
        """A merged core as balanced factors of full core rank."""
        U, S, Vt = np.linalg.svd(core, full_matrices=False)
        root = np.sqrt(S)
        return _recombined(self.factors, self.left @ (U * root), self.right @ (Vt.T * root), dtype=np.dtype(dtype))


def cores(items: Sequence[Factors | None]) -> Cores:
    """The cores of several experts' factors; None stands for an expert without this module, whose core is zero.

    Each expert is first brought to its own balanced SVD, so that the result depends on deltas and not on how training
    split them into B and A. Directions that the experts share, or do not have, are dropped below 1e-6 of the largest.
    """
    present = [item for item in items if item is not None]
    found = None
    if sum(item.rank for item in present) <= min(present[0].shape):
        found = _cores_by_grams(items, stack(present, [1.0] * len(present)))
    return _cores_by_bases(items) if found is None else found


def _cores_by_grams(items: Sequence[Factors | None], whole: Factors) -> Cores | None:
    """The cores from the Gram matrices of all factors side by side, or None where a direction is too weak for that."""
    grams = [_gram(whole.B), _gram(whole.A.T)]
    turns = [np.zeros_like(gram) for gram in grams]
    places = _places(items)
    for place in places:
        if place.start < place.stop:
            own = _by_grams(grams[0][place, place], grams[1][place, place], place.stop - place.start)
            if own is None:
                return None
            turns[0][place, place], turns[1][place, place] = own.left, own.right
    halves = [_half(turn.T @ gram @ turn, condition=1 / _SAFE_CORE) for gram, turn in zip(grams, turns, strict=True)]
    if halves[0] is None or halves[1] is None:
        return None
    left, right = halves[0], halves[1]
    stacked = np.stack([left.core[place].T @ right.core[place] for place in places])
    ranks = tuple(place.stop - place.start for place in places)
    return Cores(whole, turns[0] @ left.inverse.T, stacked, turns[1] @ right.inverse.T, ranks)


def left_directions(items: Sequence[Factors]) -> tuple[Float64, Float64] | None:
    """Left singular directions and singular values of deltas side by side, [D_1 .. D_T]: (d_out, R) and (R,), falling.

    None where a direction is too weak for Gram matrices.
    """
    whole = stack(items, [1.0] * len(items))
    if whole.rank > len(whole.B):
        return None
    right = np.zeros((whole.rank, whole.rank))
    for place, item in zip(_places(items), items, strict=True):
        right[place, place] = _gram(item.A.T)
    found = _by_grams(_gram(whole.B), right, whole.rank)
    if found is None:
        return None
    sizes = np.sqrt(found.squares)
    none = np.zeros((whole.rank, 0))
    return _recombined(whole, found.left / np.sqrt(sizes), none, dtype=np.dtype(np.float64)).B, sizes


def _places(items: Sequence[Factors | None]) -> list[slice]:
    """Where each expert's directions stand among all of them."""
    ends = np.cumsum([0, *(0 if item is None else item.rank for item in items)]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _cores_by_bases(items: Sequence[Factors | None]) -> Cores:
    """The cores by QR and SVD of all factors side by side, whatever their condition."""
    own = [None if item is None else _canonical(item) for item in items]
    present = [item for item in own if item is not None]
    left = _basis(np.concatenate([item.B for item in present], axis=1))
    right = _basis(np.concatenate([item.A.T for item in present], axis=1))
    stacked = np.zeros((len(items), left.shape[1], right.shape[1]))
    for row, item in zip(stacked, own, strict=True):
        if item is not None:
            row[:] = (left.T @ item.B) @ (item.A @ right)
    ranks = tuple(0 if item is None else item.rank for item in own)
    return Cores(Factors(left, right.T), np.eye(left.shape[1]), stacked, np.eye(right.shape[1]), ranks)


def _canonical(item: Factors) -> Factors:
    wide = Factors(item.B.astype(np.float64), item.A.astype(np.float64))
    found = truncate(wide, wide.rank).factors
    sizes = np.einsum("ij,ij->j", found.B, found.B)
    rank = max(1, count_above(sizes, NEGLIGIBLE * sizes.max(initial=0.0)))
    return Factors(found.B[:, :rank], found.A[:rank])


def _basis(columns: Float64) -> Float64:
    """Orthonormal basis of the span of some columns."""
    Q, R = np.linalg.qr(columns)
    U, sizes, _ = np.linalg.svd(R)
    rank = max(1, count_above(sizes, NEGLIGIBLE * sizes.max(initial=0.0)))
    return np.asarray(Q @ U[:, :rank])
