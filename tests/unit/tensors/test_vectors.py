"""Inner products of low-rank deltas are those of the dense deltas; task vectors go there and back."""

import numpy as np
import pytest

from moerge.tensors import vectors
from moerge.tensors.kind import LowRank


def low_rank(seed, *, rank, shape=(7, 5), scaling=1.0):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
    return LowRank(A.astype(np.float32), B.astype(np.float32), scaling)


def dense(x):
    return x.scaling * x.B.astype(np.float64) @ x.A.astype(np.float64)


def test_a_worked_inner_product():
    x = LowRank(np.array([[1, 2]], np.float32), np.array([[3], [4]], np.float32), 2.0)  # [[6, 12], [8, 16]]
    y = LowRank(np.array([[1, 0]], np.float32), np.array([[0], [5]], np.float32), 3.0)  # [[0, 0], [15, 0]]
    assert vectors.inner(x, y) == 120.0
    assert vectors.norm(y) == 15.0


@pytest.mark.parametrize("ranks", [(1, 1), (2, 4), (5, 3)])
def test_inner_products_are_those_of_the_dense_deltas(ranks):
    x, y = low_rank(1, rank=ranks[0], scaling=2.5), low_rank(2, rank=ranks[1], scaling=-0.5)
    assert vectors.inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), rel=1e-12)
    assert vectors.norm(x) == pytest.approx(float(np.linalg.norm(dense(x))), rel=1e-12)


def test_deltas_of_different_shapes_have_no_inner_product():
    with pytest.raises(ValueError, match="no inner product"):
        vectors.inner(low_rank(1, rank=2), low_rank(1, rank=2, shape=(5, 7)))


def test_a_gram_matrix_counts_missing_modules_as_zero():
    x = {"a": low_rank(1, rank=2, scaling=3.0), "b": low_rank(2, rank=1)}
    y = {"b": low_rank(3, rank=3), "c": low_rank(4, rank=1)}
    z = {"c": low_rank(5, rank=2)}
    found = vectors.gram([x, y, z])

    def wanted(one, other):
        return sum(float((dense(one[name]) * dense(other[name])).sum()) for name in one.keys() & other.keys())

    assert np.allclose(found, [[wanted(one, other) for other in (x, y, z)] for one in (x, y, z)], rtol=1e-10)
    assert found[0, 2] == 0
    assert found[0, 1] != 0


def test_cosines_are_one_with_oneself_minus_one_with_the_opposite_and_zero_with_nothing():
    x = low_rank(1, rank=2)
    opposite, nothing = LowRank(x.A * 4, -x.B, 1.0), LowRank(x.A * 0, x.B, 1.0)
    found = vectors.cosines(vectors.gram([{"m": x}, {"m": opposite}, {"m": nothing}]))
    assert np.allclose(found, [[1, -1, 0], [-1, 1, 0], [0, 0, 0]])


def test_a_task_vector_is_tuned_minus_base():
    base = {"b": np.array([1, 2], np.float32), "a": np.array([[5.0]], np.float32)}
    tuned = {"b": np.array([1.5, 1], np.float16), "a": np.array([[7.0]], np.float32)}
    found = vectors.difference(tuned, base)
    assert list(found) == ["a", "b"]
    assert found["b"].tolist() == [0.5, -1]
    assert found["a"].tolist() == [[2]]
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "tuned", [{}, {"a": np.zeros(2, np.float32)}, {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}]
)
def test_models_of_different_tensors_have_no_difference(tuned):
    with pytest.raises(ValueError, match="not in both models"):
        vectors.difference(tuned, {"a": np.zeros(1, np.float32)})


def test_flattening_orders_by_name_and_cutting_undoes_it():
    vector = {"b": np.array([3, 4], np.float32), "a": np.array([[1], [2]], np.float32), "c": np.zeros((0,), np.float32)}
    flat = vectors.flatten(vector)
    assert flat.tolist() == [1, 2, 3, 4]
    back = vectors.cut(flat, {name: value.shape for name, value in vector.items()})
    assert {name: value.tolist() for name, value in back.items()} == {"a": [[1], [2]], "b": [3, 4], "c": []}
    assert vectors.flatten({}).shape == (0,)


def test_cutting_needs_the_right_number_of_values():
    with pytest.raises(ValueError, match="do not fill"):
        vectors.cut(np.zeros(3, np.float32), {"a": (2,)})
