"""Kinship of experts: cosine, correlation, distance and sign conflict of each pair."""

import tracemalloc

import numpy as np
import pytest

from moerge.errors import ExpertsIncompatible
from moerge.merging import kinship
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import dense_of


def test_figures_worked_by_hand():
    """[3, 4, 1, 0] and [4, -3, 2, 5] over two tensors: both means are 2; three values both change, one is opposed."""
    found = kinship.measure(
        [
            {"a": np.array([3.0, 4.0]), "b": np.array([[1.0, 0.0]])},
            {"a": np.array([4.0, -3.0]), "b": np.array([[2.0, 5.0]])},
        ]
    )
    assert found.cosine[0, 1] == found.cosine[1, 0] == pytest.approx(2 / np.sqrt(26 * 54))
    np.testing.assert_allclose(np.diag(found.cosine), 1.0)
    assert found.distance[0, 1] == pytest.approx(np.sqrt(1 + 49 + 1 + 25))
    assert found.pearson[0, 1] == pytest.approx((2 - 16) / np.sqrt((26 - 16) * (54 - 16)))
    assert found.conflict[0, 1] == found.conflict[1, 0] == pytest.approx(1 / 3)
    assert found.conflict[0, 0] == 0.0


def test_the_cosine_keeps_its_sign():
    found = kinship.measure([{"w": np.array([1.0, 1.0])}, {"w": np.array([-2.0, 0.0])}])
    assert found.cosine[0, 1] == pytest.approx(-np.sqrt(0.5))
    assert found.conflict[0, 1] == 1.0


@pytest.mark.parametrize("threads", [1, 3])
def test_factors_are_compared_as_their_deltas_are(threads):
    experts = builders.low_rank(3, shape=(300, 512))
    dense = [dense_of(expert) for expert in experts]
    found, wanted = kinship.measure(experts, threads=threads), kinship.measure(dense)
    flat = np.stack([np.concatenate([expert[name].ravel() for name in sorted(expert)]) for expert in dense])
    np.testing.assert_allclose(found.pearson, np.corrcoef(flat), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.conflict[0, 1], (flat[0] * flat[1] < 0).mean(), atol=1e-4)
    for metric in ("cosine", "pearson", "distance"):
        np.testing.assert_allclose(getattr(found, metric), getattr(wanted, metric), rtol=1e-5, atol=1e-4)


def test_the_split_into_factors_and_the_scaling_do_not_matter_but_as_a_delta():
    experts = builders.low_rank(2, dtype=np.float64)
    other = [{n: LowRank(f.A * f.scaling / 8, f.B * 8, 1.0) for n, f in expert.items()} for expert in experts]
    found, wanted = kinship.measure(other), kinship.measure(experts)
    for metric in ("cosine", "pearson", "distance", "conflict"):
        np.testing.assert_allclose(getattr(found, metric), getattr(wanted, metric), rtol=1e-9, atol=1e-9)


def test_a_missing_module_is_a_zero_delta_and_a_zero_or_constant_expert_is_like_nobody():
    first = {"v": np.array([1.0, -2.0]), "w": np.array([2.0, 0.0])}
    short, padded = {"w": np.array([1.0, 1.0])}, {"w": np.array([1.0, 1.0]), "v": np.zeros(2)}
    found, wanted = kinship.measure([first, short]), kinship.measure([first, padded])
    for metric in ("cosine", "pearson", "distance", "conflict"):
        np.testing.assert_array_equal(getattr(found, metric), getattr(wanted, metric))
    assert found.cosine[0, 1] == pytest.approx(2 / 3 / np.sqrt(2))
    nothing = kinship.measure([first, {"w": np.zeros(2)}])
    assert nothing.cosine[0, 1] == nothing.pearson[0, 1] == nothing.conflict[0, 1] == 0.0
    assert nothing.distance[0, 1] == pytest.approx(3.0)
    constant = kinship.measure([{"w": np.full(3, 0.1)}, {"w": np.arange(3.0)}])
    assert constant.pearson[0, 1] == 0.0
    assert constant.cosine[0, 1] > 0.7


def test_experts_of_different_shapes_and_none_at_all_are_refused():
    with pytest.raises(ExpertsIncompatible, match=r"w has shape \[3\] in expert 1 and \[2\] in expert 0"):
        kinship.measure([{"w": np.ones(2)}, {"w": np.ones(3)}])
    with pytest.raises(ExpertsIncompatible, match="no experts"):
        kinship.measure([])


def test_no_two_dense_deltas_lie_in_memory():
    experts = builders.low_rank(4, shape=(2048, 4096), ranks=(8,), names=("q",))
    tracemalloc.start()
    try:
        kinship.measure(experts)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
