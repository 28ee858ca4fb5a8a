"""Every strategy against one worked case, and what holds for all of them."""

import numpy as np
import pytest

from moerge import routing
from moerge.routing.base import Candidates, Query

# Two candidates with parts that no weight treats alike.
CANDIDATES = Candidates(
    experts=("o/a", "o/b"),
    s_ex=np.array([0.9, 0.1]),
    s_desc=np.array([0.5, 0.7]),
    s_cen=np.array([0.3, 0.2]),
    s_ins=np.array([0.4, 0.6]),
    bm25=np.array([5.0, 60.0]),
    matched=np.array([1, -1]),
)
# D = 0.6 * .9 + .2 * .5 + .2 * .3 = .70 and .06 + .14 + .04 = .24; b / (b + 20) = .2 and .75.
WORKED = {
    "hybrid": [0.6 * 0.70 + 0.4 * 0.2, 0.6 * 0.24 + 0.4 * 0.75],
    "dense": [0.70, 0.24],
    "bm25": [0.2, 0.75],
}


def test_every_strategy_has_a_worked_case():
    assert set(routing.catalogue()) == set(WORKED)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_scores_equal_those_worked_out_by_hand(name):
    module = routing.catalogue()[name]
    assert module.score(Query(text="q", vector=np.ones(3)), CANDIDATES) == pytest.approx(WORKED[name], abs=1e-12)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_a_strategy_scores_no_candidates_without_complaint(name):
    none = Candidates(experts=(), **dict.fromkeys(("s_ex", "s_desc", "s_cen", "s_ins", "bm25", "matched"), np.zeros(0)))
    assert routing.catalogue()[name].score(Query(text="q"), none).shape == (0,)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_bands_are_in_order_and_include_their_lower_end(name):
    spec = routing.catalogue()[name].SPEC
    assert 0 < spec.min_score <= spec.medium < spec.high < 1
    assert 0 <= spec.threshold(1) < spec.threshold(2) < spec.threshold(100) < spec.threshold(668)
    assert spec.threshold(669) == spec.threshold(100_000) == spec.min_score
    assert spec.confidence(spec.high) == "high"
    assert spec.confidence(spec.high - 1e-9) == "medium"
    assert spec.confidence(spec.medium) == "medium"
    assert spec.confidence(spec.medium - 1e-9) == "low"


def test_the_default_thresholds_are_those_measured():
    spec = routing.catalogue()["hybrid"].SPEC
    assert (spec.min_score, spec.medium, spec.high) == (0.30, 0.40, 0.60)
    assert [name for name, module in routing.catalogue().items() if not module.SPEC.needs_vector] == ["bm25"]


def test_the_threshold_among_few_experts_equals_the_value_worked_out_by_hand():
    # The highest idf is ln(1 + 6.5 / 1.5) = 1.6740 among 7 experts and ln(1 + 668.5 / 1.5) = 6.1019 among 669.
    spec = routing.catalogue()["hybrid"].SPEC
    assert spec.threshold(7) == pytest.approx(0.30 - 0.033 * (6.1019 - 1.6740), abs=6e-4)
    assert spec.threshold(0) == spec.threshold(1)
