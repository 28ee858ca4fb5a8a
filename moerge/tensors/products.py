"""Products of factors that are themselves products of small matrices: element by element, and of Kronecker's kind."""

import numpy as np

from moerge.tensors.files import Float32

Pair = tuple[Float32, Float32]


def unrolled(core: Float32, outer: Float32, inner: Float32) -> Pair:
    """A convolution kernel in Tucker form as two matrices: sum_ij outer[i, o] core[i, j, k, l] inner[j, c].

    Core (r, r, height, width), outer (r, out), inner (r, in) -> (out, r) and (r, in * height * width).
    """
    right = np.einsum("ijkl,jc->ickl", core, inner)
    return np.ascontiguousarray(outer.T), right.reshape(len(core), -1)


def hadamard(first: Pair, second: Pair) -> Pair:
    """(U1 V1) * (U2 V2), element by element, as one product, whose rank is the product of the ranks."""
    (u1, v1), (u2, v2) = first, second
    left = np.einsum("oi,oj->oij", u1, u2).reshape(len(u1), -1)
    return left, np.einsum("ik,jk->ijk", v1, v2).reshape(-1, v1.shape[1])


def kronecker(first: Pair, second: Pair) -> Pair:
    """kron(U1 V1, U2 V2) as one product, whose rank is the product of the ranks."""
    return np.kron(first[0], second[0]), np.kron(first[1], second[1])


def thin(left: Float32, right: Float32) -> Pair:
    """The same product with a rank of at most its rows and columns."""
    rows, columns = len(left), right.shape[1]
    if len(right) <= min(rows, columns):
        return left, right
    return split(left @ right)


def split(matrix: Float32) -> Pair:
    """A matrix as a product with the smaller of two identities."""
    rows, columns = matrix.shape
    identity = np.eye(min(rows, columns), dtype=np.float32)
    return (identity, matrix) if rows < columns else (matrix, identity)
