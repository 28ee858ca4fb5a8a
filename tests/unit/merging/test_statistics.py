"""Methods that need more than deltas: what they need, what they refuse, and that compact statistics are the dense ones."""

import json

import numpy as np
import pytest

from moerge import merging
from moerge.errors import ExpertsIncompatible
from moerge.merging import arrays, recipe, run
from moerge.merging.sources import Factors
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


def test_equal_information_gives_the_weighted_mean():
    experts = builders.dense(3)
    same = builders.statistics(experts, "aaa", ["fisher_diag"])
    mean = merge("linear", experts, weights=[0.5, 2.0, 1.0], parameters={"normalize": True})
    found = merge("fisher", experts, weights=[0.5, 2.0, 1.0], statistics=same)
    for name in mean:
        np.testing.assert_allclose(found[name], mean[name], rtol=1e-5, atol=1e-8)


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
