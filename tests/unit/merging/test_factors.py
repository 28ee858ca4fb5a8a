"""Truncation and cores against numpy's own SVD of the dense matrix."""

import numpy as np
import pytest

from moerge.merging import factors, noise
from moerge.merging.sources import Factors

KEY = noise.key(0, "svd", "w")


def best(delta, rank):
    U, S, Vt = np.linalg.svd(delta)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank], (S[:rank] ** 2).sum(), (S**2).sum()


def some(rows, columns, rank, *, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(rows, rank)).astype(dtype), rng.normal(size=(rank, columns)).astype(dtype))


def assert_best(found, delta, rank, *, atol=1e-9):
    wanted, kept, whole = best(delta, rank)
    assert found.factors.rank == min(rank, *delta.shape)
    np.testing.assert_allclose(found.factors.delta(), wanted, atol=atol * np.abs(delta).max())
    assert found.kept == pytest.approx(kept, rel=1e-6)
    assert found.whole == pytest.approx(whole, rel=1e-6)
    # Both factors carry the same share of the size.
    B, A = found.factors
    np.testing.assert_allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 7), (30, 40, 7), (8, 30, 20), (30, 8, 20), (1, 9, 3)])
@pytest.mark.parametrize("wanted", [1, 4, 7])
def test_a_product_is_truncated_to_the_best_delta(rows, columns, rank, wanted):
    given = some(rows, columns, rank)
    found = factors.truncate(given, wanted)
    if wanted <= min(rows, columns):
        assert_best(found, given.delta(), wanted)


def test_truncation_does_not_care_how_a_delta_is_split():
    """Columns of B from 1e-12 to 1e12, rows of A the other way round."""
    given = some(60, 50, 9)
    gauge = 10.0 ** np.linspace(-12, 12, 9)
    found = factors.truncate(Factors(given.B * gauge, given.A / gauge[:, None]), 5)
    assert_best(found, given.delta(), 5)


def test_truncation_survives_directions_that_repeat_or_vanish():
    one = some(60, 50, 4)
    twice = Factors(np.concatenate([one.B, one.B, 0 * one.B], axis=1), np.concatenate([one.A, one.A, one.A]))
    assert_best(factors.truncate(twice, 3), 2 * one.delta(), 3)
    nearly = Factors(np.concatenate([one.B, one.B * (1 + 1e-9)], axis=1), np.concatenate([one.A, one.A[::-1]]))
    assert_best(factors.truncate(nearly, 3), nearly.delta(), 3, atol=1e-7)


def test_truncation_of_a_sum_that_cancels_keeps_what_is_left():
    one, small = some(60, 50, 4), some(60, 50, 2, seed=1)
    both = Factors(np.concatenate([one.B, one.B, 1e-4 * small.B], axis=1), np.concatenate([one.A, -one.A, small.A]))
    np.testing.assert_allclose(factors.truncate(both, 2).factors.delta(), 1e-4 * small.delta(), atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weakest", [0, -2, -4, -5, -6, -9, -14])
def test_truncation_is_the_best_whatever_the_condition_of_the_factors(weakest, dtype):
    """Columns of B lean on each other more and more, past where Gram matrices say anything."""
    rng = np.random.default_rng(3)
    given = some(60, 50, 12)
    mixing = np.linalg.qr(rng.normal(size=(12, 12)))[0] * 10.0 ** np.linspace(0, weakest, 12)
    given = Factors((given.B @ mixing @ rng.normal(size=(12, 12))).astype(dtype), given.A.astype(dtype))
    delta = given.B.astype(np.float64) @ given.A.astype(np.float64)
    for rank in (1, 4, 9):
        found = factors.truncate(given, rank)
        _, kept, whole = best(delta, rank)
        assert found.kept == pytest.approx(kept, rel=1e-9)
        assert found.whole == pytest.approx(whole, rel=1e-9)
        B, A = (part.astype(np.float64) for part in found.factors)
        rounding = 1e-6 if dtype == np.float32 else 1e-10
        smallest = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[rank:])
        assert np.linalg.norm(delta - B @ A) <= (1 + 1e-5) * smallest + rounding * np.sqrt(whole)


@pytest.mark.parametrize("weakest", [0, -3, -8])
def test_left_directions_are_those_of_the_deltas_side_by_side_or_none(weakest):
    items = [some(40, 30, rank, seed=rank) for rank in (3, 2, 4)]
    items[1] = Factors(items[1].B * 10.0**weakest, items[1].A)
    found = factors.left_directions(items)
    if weakest == -8:
        assert found is None
        return
    U, S, _ = np.linalg.svd(np.concatenate([item.delta() for item in items], axis=1))
    np.testing.assert_allclose(found[1], S[:9], rtol=1e-8)
    np.testing.assert_allclose(np.abs((found[0] * U[:, :9]).sum(axis=0)), 1, rtol=1e-8)
    assert factors.left_directions([some(6, 30, 4), some(6, 30, 4, seed=1)]) is None


def test_a_large_dense_delta_with_one_giant_direction_keeps_what_lies_far_below_it():
    rng = np.random.default_rng(0)
    tail = some(300, 300, 12, seed=5).delta() * 1e-3
    giant = np.outer(rng.normal(size=300), rng.normal(size=300))
    delta = (giant + tail).astype(np.float32)
    found = factors.truncate_dense(delta, 13, key=KEY)
    assert np.linalg.norm(delta - found.factors.delta()) < 1e-2 * np.linalg.norm(tail)
    assert found.sizes[:13] == pytest.approx(np.linalg.svd(delta.astype(np.float64))[1][:13] ** 2, rel=1e-3)


def test_nothing_is_truncated_to_nothing():
    found = factors.truncate(Factors(np.zeros((6, 3)), np.ones((3, 5))), 2)
    assert not found.factors.delta().any()
    assert found.share == 1.0


def test_a_large_dense_delta_of_zeros_is_truncated_to_zeros():
    found = factors.truncate_dense(np.zeros((300, 300), np.float32), 4, key=KEY)
    assert found.share == 1.0
    assert not found.factors.delta().any()


def test_a_small_dense_delta_is_truncated_exactly():
    delta = np.random.default_rng(0).normal(size=(50, 40))
    assert_best(factors.truncate_dense(delta, 6, key=KEY), delta, 6)


def test_a_large_dense_delta_is_truncated_nearly_as_well_as_can_be():
    """A flat spectrum is the hard case: the error may exceed the smallest possible one by a thousandth."""
    rng = np.random.default_rng(0)
    delta = (rng.standard_t(3, size=(700, 600)) * (rng.random((700, 600)) < 0.2)).astype(np.float32)
    delta += 3 * some(700, 600, 5, dtype=np.float32).delta()
    found = factors.truncate_dense(delta, 16, key=KEY)
    _, kept, whole = best(delta.astype(np.float64), 16)
    assert found.whole == pytest.approx(whole, rel=1e-6)
    assert found.kept == pytest.approx(kept, rel=2e-3)
    error = np.linalg.norm(delta - found.factors.delta()) ** 2
    assert error == pytest.approx(found.whole - found.kept, rel=1e-3)
    assert error < 1.002 * (whole - kept)


def test_the_random_directions_follow_the_key():
    delta = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    first, again, other = (
        factors.truncate_dense(delta, 8, key=key).factors for key in (KEY, KEY, noise.key(0, "svd", "v"))
    )
    assert first.B.tobytes() == again.B.tobytes()
    assert first.B.tobytes() != other.B.tobytes()


def test_squared_norms_are_those_of_the_dense_matrix():
    given = some(40, 30, 5)
    assert factors.square_norm_of(given) == pytest.approx((given.delta() ** 2).sum())
    assert factors.square_norm(given.delta()) == pytest.approx((given.delta() ** 2).sum())


def test_cores_expand_to_the_deltas_they_stand_for():
    items = [some(40, 30, rank, seed=rank) for rank in (3, 2, 4)]
    held = factors.cores([items[0], None, items[1], items[2]])
    assert held.cores.shape == (4, 9, 9)
    assert held.ranks == (3, 0, 2, 4)
    left, right = held.factors.B @ held.left, held.factors.A.T @ held.right
    np.testing.assert_allclose(left.T @ left, np.eye(9), atol=1e-12)
    np.testing.assert_allclose(right.T @ right, np.eye(9), atol=1e-12)
    for item, core in zip([items[0], None, items[1], items[2]], held.cores, strict=True):
        wanted = np.zeros((40, 30)) if item is None else item.delta()
        np.testing.assert_allclose(left @ core @ right.T, wanted, atol=1e-10)
        np.testing.assert_allclose(held.expand(core).delta(), wanted, atol=1e-10)


def test_cores_of_a_rank_that_fills_the_matrix_are_as_small_as_the_matrix():
    held = factors.cores([some(10, 30, 8, seed=1), some(10, 30, 8, seed=2)])
    assert held.cores.shape == (2, 10, 16)


def test_the_polar_factor_is_the_closest_orthogonal_matrix():
    matrix = some(8, 5, 5).delta()
    found = factors.polar(matrix)
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(found.T @ matrix, matrix.T @ found, atol=1e-12)
    assert (np.linalg.eigvalsh(found.T @ matrix) > 0).all()
