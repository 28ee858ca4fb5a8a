"""Drafts stand where their card would stand if it were in the index."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.routing import cards, drafts
from moerge.routing.base import Query
from moerge.routing.cards import Card
from tests.unit.routing.builders import DIMENSION, WORDS, crowd, entry, state, unit


def question(seed: int) -> Query:
    rng = np.random.default_rng(seed)
    row = rng.normal(size=DIMENSION)
    return Query(text=" ".join(rng.choice(WORDS, size=4)), vector=(row / np.linalg.norm(row)).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 30), seed=st.integers(0, 5000))
def test_a_draft_stands_where_it_would_once_it_is_put_in(count, seed):
    draft = entry("x/draft", description="salt oven", examples=("book a flight", "bank card"), seed=seed)
    there = state(*crowd(count, seed=seed))
    query = question(seed)
    met = drafts.standing(there, draft, query)
    wanted = there.changed(seq=2, put=[draft]).rank(query, base_model="base/a")
    own = next(hit for hit in wanted.hits if hit.expert == "x/draft")
    assert (met.score, met.min_score) == (own.score, wanted.min_score)
    before = [(hit.expert, hit.score, hit.revision) for hit in wanted.hits if hit.score >= own.score and hit != own]
    assert [(rival.expert, rival.score, rival.revision) for rival in met.rivals] == before
    assert len(there) == count


def test_an_expert_that_the_draft_replaces_does_not_compete_with_it():
    rows = [unit(1), unit(1)]
    old = entry("o/mine", examples=("salt",), vectors=rows)
    other = entry("o/other", examples=("salt",), vectors=rows)
    there = state(old, other, *crowd(5))
    query = Query(text="salt", vector=unit(1))
    assert [r.expert for r in drafts.standing(there, entry("new", examples=("salt",), vectors=rows), query).rivals] == [
        "o/mine", "o/other",
    ]  # fmt: skip
    replaced = drafts.standing(there, entry("o/mine", description="oven", vectors=[unit(0, 1)]), query)
    assert replaced.rivals[0].expert == "o/other"
    assert "o/mine" not in {rival.expert for rival in replaced.rivals}
    assert there.partitions["base/a"].card("o/mine").examples == ("salt",)


def test_the_threshold_is_that_of_the_encoder_in_use():
    there = dataclasses.replace(state(*crowd(700)), thresholds={"hybrid": {"min_score": 0.77}})
    assert drafts.standing(there, entry("x/draft"), question(1)).min_score == 0.77


def test_equal_scores_count_against_the_draft_whatever_its_name():
    rows = [unit(1), unit(1)]
    there = state(entry("m/twin", name="n", examples=("salt",), vectors=rows))
    for name in ("a/draft", "z/draft"):
        draft = entry(name, name="n", examples=("salt",), vectors=rows)
        met = drafts.standing(there, draft, Query(text="salt", vector=unit(1)))
        assert [(rival.expert, rival.score) for rival in met.rivals] == [("m/twin", met.score)]


def card(*examples, instruction=""):
    return Card(expert="x", base_model="b", name="n", examples=examples, instruction=instruction)


def test_each_example_is_left_out_once_with_its_own_vector_and_no_other_text_is():
    vectors = np.array([unit(0, 0, 1), unit(1), unit(0, 1), unit(0, 0, 0, 1)])
    first, second = drafts.without_each_example(card("a", "b", instruction="i"), vectors)
    assert (first.card.examples, second.card.examples) == (("b",), ("a",))
    assert first.vectors == pytest.approx(vectors[[0, 2, 2, 3]], abs=1e-3)
    assert second.vectors == pytest.approx(vectors[[0, 1, 1, 3]], abs=1e-3)
    assert first.card.instruction == "i"


def test_an_example_given_twice_is_left_out_with_its_twin():
    vectors = np.array([unit(1, 1), unit(1), unit(0, 1), unit(1)])
    left = [made.card.examples for made in drafts.without_each_example(card("a", "b", " a\n"), vectors)]
    assert left == [("b",), ("a", " a\n"), ("b",)]


def test_a_card_with_one_example_is_asked_by_its_description_alone():
    vectors = np.array([unit(1, 1), unit(1)])
    (made,) = drafts.without_each_example(card("a"), vectors)
    assert made.vectors == pytest.approx(vectors[[0, 0]], abs=1e-3)
    assert list(drafts.without_each_example(card(), vectors[:1])) == []
    assert cards.texts(made.card) == ("n.",)
