"""Methods on a sphere, and sums with given coefficients: their definitions on plain vectors, and what is refused."""

import tracemalloc

import numpy as np
import pytest

from moerge.errors import ExpertsIncompatible
from moerge.merging import arrays
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import dense_of

WEIGHTS = [0.5, 1.0, 0.8]


def merge(method, experts, weights=None, *, statistics=None, seed=0, **parameters):
    digests = "abcdefgh"[: len(experts)]
    return arrays.merge(
        method, experts, weights=weights, parameters=parameters, statistics=statistics, digests=digests, seed=seed
    )


def flat(experts, name):
    return np.stack([builders.delta_of(expert[name]).ravel() for expert in experts])


@pytest.mark.parametrize("make", [builders.dense, builders.low_rank])
def test_the_arcs_from_a_karcher_mean_balance(make):
    experts = make(3)
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    for name, found in dense_of(merge("karcher", experts, WEIGHTS)).items():
        vectors = flat(experts, name)
        lengths = np.linalg.norm(vectors, axis=1)
        assert np.linalg.norm(found) == pytest.approx(shares @ lengths, rel=1e-5)
        mean, units = found.ravel() / np.linalg.norm(found), vectors / lengths[:, None]
        angles = np.arccos(units @ mean)
        arcs = (angles / np.sin(angles))[:, None] * (units - np.cos(angles)[:, None] * mean)
        assert np.linalg.norm(shares @ arcs) < 1e-5
        assert np.abs(found.ravel() - dense_of(merge("multislerp", experts, WEIGHTS))[name].ravel()).max() > 1e-5


def test_a_karcher_mean_of_two_is_on_the_arc_between_them():
    first, second = builders.low_rank(2, dtype=np.float64)
    alike = {
        name: LowRank(found.A, found.B * ratio, found.scaling) for name, found, ratio in same_length(first, second)
    }
    on_arc = merge("slerp", [first, alike], t=0.25)
    mean = merge("karcher", [first, alike], [3.0, 1.0])
    for name, found in dense_of(mean).items():
        np.testing.assert_allclose(found, dense_of(on_arc)[name], rtol=1e-6, atol=1e-8)


def same_length(first, second):
    for name, found in second.items():
        ratio = np.linalg.norm(builders.delta_of(first[name])) / np.linalg.norm(builders.delta_of(found))
        yield name, found, ratio


@pytest.mark.parametrize("make", [builders.dense, builders.low_rank])
def test_slerp_runs_from_the_first_expert_to_the_second_at_one_pace(make):
    first, second = make(2)
    there = dense_of(merge("slerp", [first, second], t=0.3))
    back = dense_of(merge("slerp", [second, first], t=0.7))
    by_weights = dense_of(merge("slerp", [first, second], [0.7, 0.3]))
    for name, found in there.items():
        np.testing.assert_allclose(back[name], found, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(by_weights[name], found, rtol=1e-5, atol=1e-6)
        one, other = flat([first, second], name)
        angle = np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        wanted = (np.sin(0.7 * angle) * one + np.sin(0.3 * angle) * other) / np.sin(angle)
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-4, atol=1e-5)
    for t, end in ((0.0, first), (1.0, second)):
        for name, found in dense_of(merge("slerp", [first, second], t=t)).items():
            np.testing.assert_allclose(found, builders.delta_of(end[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_parallel_and_opposite_deltas_are_interpolated_on_the_straight_line(method):
    delta = builders.values(np.random.default_rng(0), (6, 5))
    for factor in (2.0, -2.0):
        found = merge(method, [{"w": delta}, {"w": np.float32(factor) * delta}], [3.0, 1.0])["w"]
        np.testing.assert_allclose(found, (0.75 + 0.25 * factor) * delta, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scope", ["row", "column"])
def test_each_line_of_nuslerp_is_a_slerp_of_its_own(scope):
    experts = builders.low_rank(2, names=("q",))
    found = dense_of(merge("nuslerp", experts, [1.0, 3.0], scope=scope))["q"]
    matrices = [builders.delta_of(expert["q"]) for expert in experts]
    if scope == "column":
        found, matrices = found.T, [matrix.T for matrix in matrices]
    for row, one, other in zip(found, *matrices, strict=True):
        wanted = merge("slerp", [{"w": one}, {"w": other}], t=0.75, threshold=1.0)["w"]
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("slerp", {}), ("nuslerp", {}), ("nuslerp", {"scope": "row"}), ("nuslerp", {"scope": "column"}), ("karcher", {})],
)
def test_an_expert_with_factors_and_one_without_merge_as_two_without(method, parameters):
    first, second = builders.low_rank(2)
    dense = {name: found.astype(np.float32) for name, found in dense_of(second).items()}
    mixed = merge(method, [first, dense], [1.0, 3.0], **parameters)
    for name, found in dense_of(merge(method, [first, second], [1.0, 3.0], **parameters)).items():
        np.testing.assert_allclose(mixed[name], found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_are_refused_by_name_and_opposite_ones_that_do_not_are_taken(method):
    delta = np.array([3.0, -4.0])
    with pytest.raises(ExpertsIncompatible, match="The directions of w cancel"):
        merge(method, [{"w": delta}, {"w": -2 * delta}], [1.0, 1.0])
    found = merge(method, [{"w": delta}, {"w": -2 * delta}], [3.0, 1.0])["w"]
    np.testing.assert_allclose(found, 1.25 * delta)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_weights_that_cancel_among_those_who_have_a_tensor_are_refused(method):
    experts = [{"w": np.ones(2), "v": np.ones(2)}, {"w": np.ones(2), "v": np.arange(2.0)}, {"w": np.ones(2)}]
    with pytest.raises(ExpertsIncompatible, match="the experts that have v sum to 0"):
        merge(method, experts, [1.0, -1.0, 0.5], missing="skip")


@pytest.mark.parametrize(
    ("method", "count", "parameters"),
    [
        ("slerp", 2, {}), ("nuslerp", 2, {"scope": "row"}), ("nuslerp", 2, {"scope": "column"}), ("multislerp", 8, {}),
        ("karcher", 8, {}), ("lorahub", 8, {}), ("lorahub", 8, {"composition": "release"}), ("peft_ties", 8, {}),
        ("adamerging", 8, {}), ("lm_cocktail", 8, {}),
    ],
)  # fmt: skip
def test_no_dense_delta_is_formed(method, count, parameters):
    experts = builders.low_rank(count, shape=(4096, 4096), ranks=(16,), names=("q",))
    known = [{"loss": {"*": 0.1 * i}, "coefficients": {"*": 0.1 * i}} for i in range(count)]
    tracemalloc.start()
    try:
        merged = merge(method, experts, [1.0 + i for i in range(count)], statistics=known, **parameters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert merged["q"].rank <= 16 * count
    assert peak < 40 << 20


@pytest.mark.parametrize("method", ["peft_linear", "peft_ties", "peft_magnitude_prune", "peft_dare_linear"])
def test_factors_of_unequal_ranks_are_not_merged_apart(method):
    with pytest.raises(ExpertsIncompatible, match="q has rank 2 in b and 3 in a"):
        merge(method, builders.low_rank(2))


def test_lorahub_of_the_release_does_not_see_the_sign_of_all_weights():
    experts = builders.low_rank(3, ranks=(3,))
    once, turned = (merge("lorahub", experts, w, composition="release") for w in ([0.5, -1.0, 0.8], [-0.5, 1.0, -0.8]))
    for name, found in dense_of(once).items():
        np.testing.assert_allclose(dense_of(turned)[name], found)


def test_what_survives_dropping_is_divided_by_the_density_in_both_factors():
    expert = {"w": LowRank(np.ones((1, 40)), np.ones((40, 1)), 1.0)}
    for method in ("peft_dare_linear", "peft_dare_ties"):
        found = merge(method, [expert], density=0.5, seed=3)["w"]
        for factor in found:
            assert set(factor.ravel()) == {0.0, 2.0}
        assert (found.A.ravel() != found.B.ravel()).any()


def test_a_coefficient_that_is_absent_or_not_finite_is_named():
    experts = builders.low_rank(2)
    known = [{"coefficients": {"*": 0.3}}, {"coefficients": {"q": 0.3}}]
    with pytest.raises(ExpertsIncompatible, match="coefficients of v in b is None"):
        merge("adamerging", experts, statistics=known)
    known[1]["coefficients"]["v"] = float("nan")
    with pytest.raises(ExpertsIncompatible, match="coefficients of v in b is nan"):
        merge("adamerging", experts, statistics=known)
    with pytest.raises(ExpertsIncompatible, match="adamerging needs coefficients of every expert, and a comes without"):
        merge("adamerging", experts)
    with pytest.raises(ExpertsIncompatible, match="loss of b is None"):
        merge("lm_cocktail", experts, statistics=[{"loss": {"*": 1.0}}, {"loss": {}}])
    with pytest.raises(ExpertsIncompatible, match="sum to 0"):
        merge(
            "lm_cocktail",
            experts,
            [1.0, -2.0],
            statistics=[{"loss": {"*": 5 * np.log(2)}}, {"loss": {"*": 10 * np.log(2)}}],
        )
