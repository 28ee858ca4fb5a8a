"""Every strategy against one worked case, and what holds for all of them."""

import math

import numpy as np
import pytest

from moerge import routing
from moerge.routing.base import Candidates, Query

# Three candidates with parts that no weight treats alike; the first carries tags 0 and 1, the second tag 9.
CANDIDATES = Candidates(
    experts=("o/a", "o/b", "o/c"),
    s_ex=np.array([0.9, 0.1, 0.4]),
    s_desc=np.array([0.5, 0.7, 0.2]),
    s_cen=np.array([0.3, 0.2, 0.1]),
    s_ins=np.array([0.4, 0.6, -0.1]),
    bm25=np.array([15.0, 180.0, 20.0]),
    matched=np.array([1, -1, 0]),
    tag_cosines=np.array([0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.24, 0.2, 0.16, 0.1]),
    tagged=np.array([[0, 0], [0, 1], [1, 9]]),
)
# D = .6 * .9 + .2 * .5 + .2 * .3 = .70, .06 + .14 + .04 = .24 and .24 + .04 + .02 = .30; b / (b + 60) = .2, .75, .25.
HYBRID = [0.45, 0.495, 0.275]
WORKED = {
    "hybrid": HYBRID,
    "dense": [0.70, 0.24, 0.30],
    "bm25": [0.2, 0.75, 0.25],
    "centroid": [0.3, 0.2, 0.1],
    "glider": [0.4, 0.6, -0.1],
    # Tag 0 is the nearest; nine tags are nearer than tag 9, and ten than the centroid of o/c, which has no tag.
    "two_stage": [0.45, 0.2475, 0.1375],
    # The ten nearest tags have .55 + .5 + .45 + .4 + .35 + .3 + .25 + .24 + .2 + .16 = 3.4 in all.
    "skills": [0.8 * 0.45 + 0.2 * 1.05 / 3.4, 0.8 * 0.495 + 0.2 * 0.16 / 3.4, 0.8 * 0.275],
}
QUERY = Query(text="q", vector=np.ones(3))
NEED_TAGS = sorted(name for name, module in routing.catalogue().items() if module.SPEC.needs_tags)


def test_every_strategy_has_a_worked_case():
    assert set(routing.catalogue()) == set(WORKED)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_scores_equal_those_worked_out_by_hand(name):
    assert routing.catalogue()[name].score(QUERY, CANDIDATES) == pytest.approx(WORKED[name], abs=1e-12)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_a_strategy_scores_no_candidates_without_complaint(name):
    parts = ("s_ex", "s_desc", "s_cen", "s_ins", "bm25", "matched")
    none = Candidates(experts=(), **dict.fromkeys(parts, np.zeros(0)))
    assert routing.catalogue()[name].score(Query(text="q"), none).shape == (0,)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_a_score_depends_on_the_candidate_and_not_on_its_place_or_company(name):
    score = routing.catalogue()[name].score
    turned = Candidates(
        experts=CANDIDATES.experts[::-1],
        **{part: getattr(CANDIDATES, part)[::-1] for part in ("s_ex", "s_desc", "s_cen", "s_ins", "bm25", "matched")},
        tag_cosines=CANDIDATES.tag_cosines,
        tagged=np.array([[1, 9], [2, 0], [2, 1]]),
    )
    assert score(QUERY, turned)[::-1] == pytest.approx(WORKED[name], abs=1e-12)
    alone = Candidates(
        experts=("o/b",),
        **{part: getattr(CANDIDATES, part)[1:2] for part in ("s_ex", "s_desc", "s_cen", "s_ins", "bm25", "matched")},
        tag_cosines=CANDIDATES.tag_cosines,
        tagged=np.array([[0, 9]]),
    )
    assert score(QUERY, alone) == pytest.approx(WORKED[name][1:2], abs=1e-12)


@pytest.mark.parametrize("name", sorted(WORKED))
def test_equal_candidates_have_equal_scores(name):
    twins = Candidates(
        experts=("o/a", "o/b"),
        **dict.fromkeys(("s_ex", "s_desc", "s_cen", "s_ins", "bm25"), np.full(2, 0.37)),
        matched=np.zeros(2, dtype=np.int64),
        tag_cosines=np.array([0.2, 0.2, 0.9]),
        tagged=np.array([[0, 0], [1, 1]]),
    )
    first, second = routing.catalogue()[name].score(QUERY, twins)
    assert first == second


@pytest.mark.parametrize("name", NEED_TAGS)
def test_where_nobody_has_a_tag_the_order_is_that_of_hybrid(name):
    bare = Candidates(
        experts=CANDIDATES.experts,
        **{part: getattr(CANDIDATES, part) for part in ("s_ex", "s_desc", "s_cen", "s_ins", "bm25", "matched")},
    )
    met = routing.catalogue()[name].score(QUERY, bare)
    assert np.argsort(met).tolist() == np.argsort(HYBRID).tolist()


@pytest.mark.parametrize("name", NEED_TAGS)
def test_a_tag_near_the_query_lifts_an_expert_over_its_equal(name):
    twins = Candidates(
        experts=("o/a", "o/b"),
        **dict.fromkeys(("s_ex", "s_desc", "s_cen", "s_ins", "bm25"), np.full(2, 0.37)),
        matched=np.zeros(2, dtype=np.int64),
        tag_cosines=np.linspace(0.9, -0.9, 20),
        tagged=np.array([[0, 19], [1, 0]]),
    )
    first, second = routing.catalogue()[name].score(QUERY, twins)
    assert second > first


def test_the_eighth_category_is_looked_into_and_the_ninth_is_not():
    twins = Candidates(
        experts=("o/a", "o/b", "o/c", "o/d"),
        **{part: np.full(4, 0.4) for part in ("s_ex", "s_desc", "s_ins")},
        s_cen=np.array([0.4, 0.4, 0.61, 0.59]),
        bm25=np.zeros(4),
        matched=np.zeros(4, dtype=np.int64),
        tag_cosines=np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.91, 0.92, 0.93, 0.94]),
        tagged=np.array([[0, 1], [1, 0]]),
    )
    met = routing.catalogue()["two_stage"].score(QUERY, twins)
    full = 0.5 * (0.8 * 0.4 + 0.2 * twins.s_cen)
    # Seven tags are nearer than tag 1 and than .61, eight than tag 0 and than .59.
    assert met == pytest.approx(full * np.array([1, 0.5, 1, 0.5]), abs=1e-12)


@pytest.mark.parametrize("name", NEED_TAGS)
def test_tags_that_all_point_away_from_the_query_give_numbers(name):
    away = Candidates(
        experts=("o/a", "o/b"),
        **dict.fromkeys(("s_ex", "s_desc", "s_cen", "s_ins"), np.full(2, -0.2)),
        bm25=np.zeros(2),
        matched=np.zeros(2, dtype=np.int64),
        tag_cosines=np.array([-0.3, -0.5]),
        tagged=np.array([[0, 0]]),
    )
    assert np.isfinite(routing.catalogue()[name].score(QUERY, away)).all()


@pytest.mark.parametrize("name", sorted(WORKED))
def test_bands_are_in_order_and_include_their_lower_end(name):
    spec = routing.catalogue()[name].SPEC
    assert 0 < spec.min_score <= spec.medium < spec.high < 1
    assert 0 <= spec.threshold(1) <= spec.threshold(2) <= spec.threshold(100) <= spec.threshold(668)
    assert (spec.threshold(1) < spec.threshold(668)) == (spec.relief > 0)
    assert spec.threshold(669) == spec.threshold(100_000) == spec.min_score
    for expert_count in (1, 30, 669, 100_000):
        fall = spec.relief * max(0, math.log1p(668.5 / 1.5) - math.log1p((expert_count - 0.5) / 1.5))
        for edge, above, below in ((spec.high, "high", "medium"), (spec.medium, "medium", "low")):
            assert spec.confidence(edge - fall + 1e-3, expert_count) == above
            assert spec.confidence(edge - fall - 1e-3, expert_count) == below
    assert (spec.confidence(spec.high, 669), spec.confidence(spec.medium, 669)) == ("high", "medium")


def test_only_words_need_no_vector():
    assert [name for name, module in routing.catalogue().items() if not module.SPEC.needs_vector] == ["bm25"]


def test_the_threshold_among_few_experts_equals_the_value_worked_out_by_hand():
    # The highest idf is ln(1 + 6.5 / 1.5) = 1.6740 among 7 experts and ln(1 + 668.5 / 1.5) = 6.1019 among 669.
    spec = routing.catalogue()["hybrid"].SPEC
    assert spec.threshold(7) == pytest.approx(0.24 - 0.021 * (6.1019 - 1.6740), abs=6e-4)
    assert spec.threshold(0) == spec.threshold(1)
