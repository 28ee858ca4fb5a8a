"""BM25 against values worked out by hand and against a plain loop over documents."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.routing import bm25, cards


def index(*documents: str) -> bm25.Bm25:
    return bm25.EMPTY.changed(
        slot_count=len(documents),
        removed={},
        added={slot: Counter(cards.tokens(text)) for slot, text in enumerate(documents)},
    )


def plain(documents: list[str], query: str) -> list[float]:
    """The formula of the module, document by document."""
    words = [cards.tokens(document) for document in documents]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        total = 0.0
        for term in set(cards.tokens(query)):
            containing = sum(term in other for other in words)
            idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
            count = own.count(term)
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(own) / mean)) if count else 0.0
        scores.append(total)
    return scores


def test_scores_equal_those_worked_out_by_hand():
    # Three documents of 2, 4 and 6 words, mean 4. "flight" is in two of them: idf = ln(1 + 1.5 / 2.5) = 0.4700036.
    # Slot 0: once in 2 words: 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 4)) = 2.2 / 1.75 = 1.2571429.
    # Slot 2: twice in 6 words: 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 6 / 4)) = 4.4 / 3.65 = 1.2054795.
    made = index("book flight", "one two three four", "flight flight a b c d")
    assert made.scores("flight") == pytest.approx([0.4700036 * 1.2571429, 0.0, 0.4700036 * 1.2054795], abs=1e-6)


def test_a_word_of_the_query_counts_once_however_often_it_is_said():
    made = index("book flight", "flight flight hotel", "salt")
    assert made.scores("flight flight FLIGHT!") == pytest.approx(made.scores("flight"))
    assert made.scores("flight")[0] > 0


def test_a_word_on_every_card_never_counts_against_a_card():
    made = index("the a", "the b", "the c")
    assert (made.scores("the") > 0).all()
    assert made.idf(3) == pytest.approx(math.log(1 + 0.5 / 3.5))


def test_a_query_without_known_words_scores_nothing():
    assert not index("book flight", "hotel").scores("Größe ?!").any()
    assert bm25.EMPTY.scores("book").shape == (0,)


def test_documents_without_words_neither_match_nor_break():
    assert index("", "").scores("book").tolist() == [0.0, 0.0]


WORDS = st.lists(st.sampled_from("abcdef"), max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(WORDS, min_size=1, max_size=6).filter(any), query=WORDS)
def test_scores_equal_the_plain_loop(documents, query):
    assert index(*documents).scores(query) == pytest.approx(plain(documents, query), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(first=st.lists(WORDS, min_size=1, max_size=5), second=st.dictionaries(st.integers(0, 6), WORDS), query=WORDS)
def test_a_changed_index_equals_one_built_anew(first, second, query):
    old = index(*first)
    before = old.scores(query)
    documents = dict(enumerate(first)) | second
    count = max(documents) + 1
    counts = {slot: Counter(cards.tokens(text)) for slot, text in documents.items()}
    changed = old.changed(
        slot_count=count,
        removed={slot: Counter(cards.tokens(first[slot])) for slot in second if slot < len(first)},
        added={slot: counts[slot] for slot in second},
    )
    anew = bm25.EMPTY.changed(slot_count=count, removed={}, added=counts)
    assert changed.document_count == anew.document_count == len(documents)
    assert changed.scores(query) == pytest.approx(anew.scores(query), abs=1e-12)
    assert changed.terms.keys() == anew.terms.keys()
    assert np.array_equal(old.scores(query), before)


def test_a_removed_document_leaves_the_statistics_too():
    old = index("book flight", "flight hotel", "salt")
    new = old.changed(slot_count=3, removed={1: Counter(["flight", "hotel"])}, added={})
    # One of two documents is left with "flight": both have 2 and 1 words, mean 1.5.
    idf = math.log(1 + 1.5 / 1.5)
    assert new.scores("flight hotel") == pytest.approx([idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 1.5)), 0, 0])
    assert "hotel" not in new.terms
