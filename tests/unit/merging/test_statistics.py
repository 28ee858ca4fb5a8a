"""Methods that need more than deltas: what they need, what they refuse, and that compact statistics are the dense ones."""

import json
import tracemalloc

import numpy as np
import pytest

from moerge import merging
from moerge.errors import ExpertsIncompatible
from moerge.merging import arrays, recipe, run
from moerge.merging.sources import Factors
from moerge.merging.statistics import Gram
from tests.unit.merging import builders
from tests.unit.merging.builders import dense_of
from tests.unit.merging.test_run import Q, deltas, expected, write

KINDS = {"fisher_diag", "gram_in", "gram_out"}
STATISTICAL = sorted(name for name, spec in merging.catalogue().items() if KINDS & set(spec.needs))


def merge(method, experts, **options):
    return dense_of(arrays.merge(method, experts, digests=list("abc")[: len(experts)], **options))


@pytest.mark.parametrize("method", STATISTICAL)
def test_an_expert_without_the_statistics_is_refused_by_name_and_kind(method):
    experts, needs = builders.dense(2), merging.catalogue()[method].needs
    known = builders.statistics(experts, "ab", needs)
    for given in (None, [known[0], {}]):
        with pytest.raises(
            ExpertsIncompatible, match=f"{method} needs {needs[0]} of every expert, and .* without"
        ) as caught:
            merge(method, experts, statistics=given)
        assert caught.value.wanted == needs[0]
    assert "and b comes without" in caught.value.detail


@pytest.mark.parametrize("method", STATISTICAL)
def test_a_matrix_without_its_statistics_is_refused_by_name(method):
    experts, (kind, *_) = builders.dense(2), merging.catalogue()[method].needs
    known = builders.statistics(experts, "ab", [kind])
    del known[1][kind]["layer.weight"]
    with pytest.raises(ExpertsIncompatible, match=rf"b comes without {kind} of layer\.weight"):
        merge(method, experts, statistics=known)


@pytest.mark.parametrize("method", STATISTICAL)
def test_statistics_of_the_wrong_shape_or_without_finite_values_are_refused(method):
    experts, (kind, *_) = builders.dense(2), merging.catalogue()[method].needs
    for spoil, reason in ((lambda found: found[1:], "shape"), (lambda found: found * np.nan, "NaN")):
        known = builders.statistics(experts, "ab", [kind])
        known[0][kind]["layer.weight"] = spoil(known[0][kind]["layer.weight"])
        with pytest.raises(ExpertsIncompatible, match=rf"{kind} of layer\.weight in a has {reason}"):
            merge(method, experts, statistics=known)


def test_information_below_zero_is_refused():
    experts = builders.dense(1)
    known = builders.statistics(experts, "a", ["fisher_diag"])
    known[0]["fisher_diag"]["layer.bias"][2] = -1e-9
    with pytest.raises(ExpertsIncompatible, match="below zero"):
        merge("fisher", experts, statistics=known)


def test_information_given_by_rows_and_columns_is_that_of_their_products():
    rng = np.random.default_rng(3)
    experts = builders.low_rank(2, names=("q",), dtype=np.float64)
    parts = [(rng.random((24, 1)), rng.random((1, 20))) for _ in experts]
    compact = [{"fisher_diag": {"q": Factors(rows, columns)}} for rows, columns in parts]
    whole = [{"fisher_diag": {"q": rows @ columns}} for rows, columns in parts]
    for parameters in ({}, {"equalize": True}):
        found, wanted = (
            merge("fisher", experts, weights=[0.5, 2.0], statistics=known, parameters=parameters)
            for known in (compact, whole)
        )
        np.testing.assert_allclose(found["q"], wanted["q"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", STATISTICAL)
def test_equal_statistics_give_the_weighted_mean(method):
    for experts in (builders.dense(3), builders.low_rank(3)):
        same = builders.statistics(experts, "aaa", merging.catalogue()[method].needs)
        mean = merge("linear", experts, weights=[0.5, 2.0, 1.0], parameters={"normalize": True})
        found = merge(method, experts, weights=[0.5, 2.0, 1.0], statistics=same)
        for name in mean:
            np.testing.assert_allclose(found[name], mean[name], rtol=1e-4, atol=1e-6)


def grams(experts, *, directions, seed=5):
    """Gram matrices of a few directions and a diagonal per expert and module, and the same as matrices."""
    rng = np.random.default_rng(seed)
    compact, whole = [], []
    for expert in experts:
        side = next(iter(expert.values())).A.shape[1]
        found = {
            name: Gram(rng.normal(size=(directions, side)), rng.random(directions) + 0.5, rng.random(side) + 0.1)
            for name in expert
        }
        compact.append({"gram_in": found})
        whole.append(
            {
                "gram_in": {
                    name: g.vectors.T @ np.diag(g.values) @ g.vectors + np.diag(g.rest) for name, g in found.items()
                }
            }
        )
    return compact, whole


@pytest.mark.parametrize("method", ["regmean", "mats"])
@pytest.mark.parametrize("directions", [3, 8])
def test_a_gram_of_few_directions_is_the_matrix_it_stands_for(method, directions):
    """Three times three directions are fewer than the 20 columns, three times eight are more."""
    experts, weights = builders.low_rank(3, dtype=np.float64), [0.5, 2.0, 1.0]
    few = {"iterations": 5} if method == "mats" else {}
    for off_diagonal in (1.0, 0.6):
        found, wanted = (
            merge(method, experts, weights=weights, statistics=known, parameters={"off_diagonal": off_diagonal, **few})
            for known in grams(experts, directions=directions)
        )
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-8, atol=1e-10)


def test_regmean_on_factors_is_the_formula_on_matrices():
    experts, weights = builders.low_rank(3, dtype=np.float64), [0.5, 2.0, 1.0]
    _, known = grams(experts, directions=4)
    merged = arrays.merge("regmean", experts, weights=weights, statistics=known, parameters={"off_diagonal": 0.7})
    for name, found in merged.items():
        shrunk = [
            weight * (0.7 * one["gram_in"][name] + 0.3 * np.diag(np.diag(one["gram_in"][name])))
            for one, weight in zip(known, weights, strict=True)
        ]
        answers = sum(builders.delta_of(e[name]) @ gram for e, gram in zip(experts, shrunk, strict=True))
        assert found.rank == 9
        np.testing.assert_allclose(found.delta(), answers @ np.linalg.inv(sum(shrunk)), rtol=1e-8, atol=1e-9)


def test_mats_on_inputs_ends_where_regmean_is_and_stays_in_the_span_of_the_experts():
    experts, weights = builders.low_rank(3, dtype=np.float64), [0.5, 2.0, 1.0]
    _, known = grams(experts, directions=2)
    wanted = merge("regmean", experts, weights=weights, statistics=known)
    merged = arrays.merge("mats", experts, weights=weights, statistics=known, parameters={"iterations": 500})
    for name, found in merged.items():
        assert found.rank == 9
        assert np.linalg.norm(found.delta() - wanted[name]) < 1e-3 * np.linalg.norm(wanted[name])
    early = merge("mats", experts, weights=weights, statistics=known, parameters={"iterations": 1})
    assert np.linalg.norm(early["q"] - wanted["q"]) > 1e-2 * np.linalg.norm(wanted["q"])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("regmean", {}),
        ("mats", {}),
        ("knots", {"density": 0.3}),
        ("lora_lego", {}),
        ("twin_merging", {"compress": "svd"}),
    ],
)
def test_where_the_result_is_low_rank_no_dense_matrix_is_formed(method, parameters):
    """A dense delta of 1536 x 1536 takes 9 MiB in float32, and so would a Gram matrix."""
    experts = builders.low_rank(4, shape=(1536, 1536), names=("q",))
    rng = np.random.default_rng(0)
    known = [
        {"gram_in": {"q": Gram(rng.normal(size=(4, 1536)), rng.random(4) + 0.5, rng.random(1536) + 0.1)}}
        for _ in experts
    ]
    given = {"statistics": known} if merging.catalogue()[method].needs else {}
    tracemalloc.start()
    merged = arrays.merge(method, experts, parameters=parameters, **given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20
    assert merged["q"].rank <= 12


def test_mats_on_inputs_and_outputs_solves_its_normal_equations():
    experts, weights = builders.low_rank(2, dtype=np.float64), [0.5, 2.0]
    known = builders.statistics(experts, "ab", ["gram_in", "gram_out"])
    parameters = {"objective": "input_output", "off_diagonal": 1.0, "iterations": 500}
    merged = merge("mats", experts, weights=weights, statistics=known, parameters=parameters)
    for name, found in merged.items():
        sides = [
            sum(
                weight * one["gram_out"][name] @ delta @ one["gram_in"][name]
                for one, weight, delta in zip(known, weights, deltas, strict=True)
            )
            for deltas in ([found, found], [builders.delta_of(expert[name]) for expert in experts])
        ]
        assert np.linalg.norm(sides[0] - sides[1]) < 2e-5 * np.linalg.norm(sides[1])


def test_mats_on_outputs_needs_their_gram_matrices():
    experts = builders.low_rank(2)
    known = builders.statistics(experts, "ab", ["gram_in"])
    with pytest.raises(ExpertsIncompatible, match="a comes without gram_out of q"):
        merge("mats", experts, statistics=known, parameters={"objective": "input_output"})


@pytest.mark.parametrize("method", ["regmean", "mats"])
def test_a_matrix_without_gram_matrices_is_averaged_where_the_caller_says_so(method):
    experts = builders.low_rank(2)
    known = builders.statistics(experts, "ab", ["gram_in"])
    whole = merge(method, experts, weights=[0.5, 2.0], statistics=known)
    del known[1]["gram_in"]["v"]
    found = merge(method, experts, weights=[0.5, 2.0], statistics=known, parameters={"fallback": "mean"})
    mean = merge("linear", experts, weights=[0.5, 2.0], parameters={"normalize": True})
    np.testing.assert_allclose(found["v"], mean["v"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["q"], whole["q"])


def test_a_singular_sum_of_gram_matrices_gets_a_small_ridge_and_an_indefinite_one_is_refused():
    (expert,) = builders.low_rank(1, names=("q",), dtype=np.float64)
    vector = np.arange(1.0, 21.0)
    known = [{"gram_in": {"q": np.outer(vector, vector)}}]
    found = merge("regmean", [expert], statistics=known, parameters={"off_diagonal": 1.0})["q"]
    np.testing.assert_allclose(found @ vector, builders.delta_of(expert["q"]) @ vector, rtol=1e-3)
    with pytest.raises(ExpertsIncompatible, match="q is not positive definite"):
        merge("regmean", [expert, expert], weights=[1.0, -2.0], statistics=known * 2)
    other = [known[0], {"gram_in": {"q": np.eye(20)}}]
    with pytest.raises(ExpertsIncompatible, match="q is not positive definite"):
        merge("mats", builders.low_rank(2, names=("q",)), weights=[1.0, -2.0], statistics=other)


def named(letter, **changes):
    return {"expert": f"acme/{letter}", "revision": letter * 40, "digest": letter * 64, "weight": 1.0, **changes}


def test_a_recipe_without_statistics_is_refused_before_anything_is_computed():
    with pytest.raises(ExpertsIncompatible, match=r"fisher needs fisher_diag .* acme/b comes without") as caught:
        recipe.parse({"method": "fisher", "experts": [named("a", statistics="f" * 64), named("b")]})
    assert caught.value.pointer == "/experts/1/statistics"
    recipe.parse({"method": "linear", "experts": [named("a")]})


def test_statistics_are_part_of_what_a_recipe_is():
    first, other = (
        recipe.parse({"method": "fisher", "experts": [named("a", statistics=letter * 64)]}) for letter in "fg"
    )
    assert first.digest != other.digest
    again = recipe.parse(json.loads(json.dumps(first.to_dict())))
    assert again == first
    assert "statistics" not in recipe.parse({"method": "linear", "experts": [named("a")]}).to_dict()["experts"][0]


def test_a_recipe_on_adapters_finds_statistics_by_their_digest(tmp_path):
    adapters = [write(tmp_path / name, {Q: (24, 16, 3)}) for name in ("first", "second")]
    rng = np.random.default_rng(1)
    known = {letter * 64: {"fisher_diag": {Q: rng.random((24, 16))}} for letter in "fg"}
    experts = [
        {
            "expert": f"acme/{letter}",
            "revision": "r",
            "digest": adapter.digest,
            "weight": 1.0,
            "statistics": letter * 64,
        }
        for letter, adapter in zip("fg", adapters, strict=True)
    ]
    parsed = recipe.parse({"method": "fisher", "experts": experts, "output": {"rank": 16}})
    run.merge(parsed, {found.digest: found for found in adapters}, tmp_path / "out", statistics_by_digest=known)
    f, g = (known[letter * 64]["fisher_diag"][Q] + 1e-6 for letter in "fg")
    wanted = (f * expected(adapters[0], 8 / 3) + g * expected(adapters[1], 8 / 3)) / (f + g)
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], wanted, atol=1e-4)
    with pytest.raises(ExpertsIncompatible, match="comes without"):
        run.merge(parsed, {found.digest: found for found in adapters}, tmp_path / "none")
