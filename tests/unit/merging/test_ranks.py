"""How many ranks a share of energy takes, and which rank would have kept enough: against numpy's own SVD."""

import numpy as np
import pytest

from moerge.merging import engine, factors, ranks
from moerge.merging.ranks import Spectrum
from moerge.merging.sources import Factors


@pytest.fixture(autouse=True)
def _one_blas_thread():
    with engine.one_blas_thread():
        yield


def low_rank(seed, *, shape=(60, 44), rank=12):
    """Factors whose singular values fall slowly."""
    rng = np.random.default_rng(seed)
    B, A = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    return Factors(B.astype(np.float32), (A * np.linspace(2, 0.2, rank)[:, None]).astype(np.float32))


def energies(matrix):
    """Share of the squared norm that each rank keeps, rank 1 first."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return np.cumsum(squares) / squares.sum()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.95, 0.999])
def test_the_rank_of_a_share_is_the_smallest_that_keeps_it(share):
    for seed in range(5):
        delta = low_rank(seed)
        matrix = delta.B.astype(np.float64) @ delta.A
        for given in (delta, matrix.astype(np.float32)):
            found = ranks.fit(given, rank=44, energy=share, name="q")
            kept = energies(matrix)
            assert kept[found.factors.rank - 1] >= share
            assert found.factors.rank == 1 or kept[found.factors.rank - 2] < share
            assert found.share == pytest.approx(kept[found.factors.rank - 1], abs=1e-6)
            lost = np.linalg.norm(matrix - found.factors.delta()) ** 2 / np.linalg.norm(matrix) ** 2
            assert lost == pytest.approx(1 - found.share, abs=1e-6)


def test_a_share_of_one_keeps_all_directions_and_none_that_are_rounding():
    delta = low_rank(3, rank=5)
    twice = factors.stack([delta, delta], [0.5, 0.25])
    found = ranks.fit(twice, rank=10, energy=1.0, name="q")
    assert found.factors.rank == 5
    np.testing.assert_allclose(found.factors.delta(), 0.75 * delta.delta(), atol=1e-5)


def test_a_share_that_a_rank_keeps_exactly_is_reached_by_it():
    """Squared singular values 9 and 1: rank 1 keeps nine tenths."""
    delta = np.diag([3.0, 1.0]).astype(np.float32)
    assert ranks.fit(delta, rank=2, energy=0.9, name="q").factors.rank == 1
    assert ranks.fit(delta, rank=2, energy=0.9001, name="q").factors.rank == 2


def test_a_zero_delta_needs_one_rank():
    nothing = Factors(np.zeros((6, 3), np.float32), np.zeros((3, 5), np.float32))
    for delta in (nothing, np.zeros((6, 5), np.float32)):
        found = ranks.fit(delta, rank=3, energy=0.95, name="q")
        assert found.factors.rank == 1
        assert found.share == 1
        assert not found.factors.delta().any()


def test_the_search_in_a_large_dense_delta_grows_until_the_share_is_kept():
    """Larger than what an exact SVD is used for: the rank found is at most two above the smallest."""
    rng = np.random.default_rng(4)
    basis = [np.linalg.qr(rng.normal(size=(side, 300)))[0] for side in (320, 300)]
    sizes = 1 / (1 + np.arange(300.0) / 60)
    matrix = (basis[0] * sizes) @ basis[1].T
    found = ranks.fit(matrix.astype(np.float32), rank=300, energy=0.95, name="q")
    smallest = int(np.flatnonzero(energies(matrix) >= 0.95)[0]) + 1
    assert smallest > 64
    assert smallest <= found.factors.rank <= smallest + 2
    lost = np.linalg.norm(matrix - found.factors.delta()) ** 2 / np.linalg.norm(matrix) ** 2
    assert lost <= 0.05
    assert lost == pytest.approx(1 - found.share, abs=1e-5)


def test_a_share_beyond_the_highest_rank_is_not_claimed():
    matrix = np.random.default_rng(5).normal(size=(300, 290)).astype(np.float32)
    found = ranks.fit(matrix, rank=100, energy=0.95, name="q")
    assert found.factors.rank == 100
    lost = np.linalg.norm(matrix - found.factors.delta()) ** 2 / np.linalg.norm(matrix) ** 2
    assert found.share < 0.75
    assert found.share == pytest.approx(1 - lost, abs=1e-5)


def test_equal_deltas_in_another_gauge_need_the_same_rank():
    delta = low_rank(6)
    turn = np.random.default_rng(7).normal(size=(12, 12))
    other = Factors((delta.B @ turn).astype(np.float32), (np.linalg.inv(turn) @ delta.A).astype(np.float32))
    one, two = (ranks.fit(given, rank=12, energy=0.9, name="q") for given in (delta, other))
    assert one.factors.rank == two.factors.rank
    np.testing.assert_allclose(one.factors.delta(), two.factors.delta(), atol=1e-4)


def spectrum(squares, rank, *, known=None):
    """A module of these squared singular values, cut at a rank, of which the first `known` came to light."""
    squares = np.array(squares, dtype=np.float64)
    return Spectrum(squares.sum(), squares[:rank].sum(), rank, squares[:known])


def test_the_rank_that_would_keep_enough_counts_all_modules_together():
    """Kept of 40 in all: rank 1 16 + 5 = 21, rank 2 24 + 9 = 33, rank 3 27 + 11 = 38, rank 4 28 + 12."""
    modules = [spectrum([16, 8, 3, 1], 1), spectrum([5, 4, 2, 1], 1)]
    assert ranks.rank_for(modules, 0.8) == (2, True)
    assert ranks.rank_for(modules, 0.9) == (3, True)
    assert ranks.rank_for(modules, 0.96) == (4, True)
    # 60 more that are kept whole already: of 100 in all rank 2 keeps 93.
    assert ranks.rank_for([*modules, Spectrum(60.0, 60.0, 3, np.empty(0))], 0.9) == (2, True)


def test_where_singular_values_are_not_known_the_rank_is_a_bound_from_below():
    """Ten of a hundred equal directions are kept and twenty known: ninety hundredths need ninety."""
    module = spectrum([1.0] * 100, 10, known=20)
    assert ranks.rank_for([module], 0.9) == (90, False)
    falling = spectrum(1.0 / np.arange(1, 401), 10, known=20)
    needed, is_exact = ranks.rank_for([falling], 0.9)
    truth = int(np.flatnonzero(energies(np.diag(np.arange(1, 401) ** -0.5)) >= 0.9)[0]) + 1
    assert not is_exact
    assert 10 < needed <= truth
