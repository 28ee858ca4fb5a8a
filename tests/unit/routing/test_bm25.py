"""BM25 against values worked out by hand and against a plain loop over documents."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.routing import bm25, cards
from moerge.routing.bm25 import Collector, Corpus, Part
from tests.unit.routing.builders import terms


def part(documents, masked=None, order=None) -> Part:
    collector = Collector()
    for text in documents:
        collector.add(Counter(cards.tokens(text)))
    places = np.arange(len(documents)) if order is None else np.array(order)
    return Part(words=collector.words(places), masked=None if masked is None else np.array(masked, dtype=bool))


def index(*documents: str) -> Corpus:
    return Corpus([part(documents)])


def plain(documents: list[str], query: str) -> list[float]:
    """The formula of the module, document by document."""
    words = [terms(document) for document in documents]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        total = 0.0
        for term in set(terms(query)):
            containing = sum(term in other for other in words)
            idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
            count = own.count(term)
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(own) / mean)) if count else 0.0
        scores.append(total)
    return scores


def test_scores_equal_those_worked_out_by_hand():
    # Three documents of 2, 4 and 6 words and 1, 3 and 5 pairs: 3, 7 and 11 terms, mean 7. "flight" is in two of them:
    # idf = ln(1 + 1.5 / 2.5) = 0.4700036.
    # Slot 0: once in 3 terms: 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / 7)) = 2.2 / 1.6857143 = 1.3050847.
    # Slot 2: twice in 11 terms: 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 11 / 7)) = 4.4 / 3.7142857 = 1.1846154.
    made = index("book flight", "one two three four", "flight flight a b c d")
    assert made.scores("flight") == pytest.approx([0.4700036 * 1.3050847, 0.0, 0.4700036 * 1.1846154], abs=1e-6)


def test_a_word_of_the_query_counts_once_however_often_it_is_said():
    made = index("book flight", "flight flight hotel", "salt")
    assert made.scores("hotel salt hotel SALT") == pytest.approx(made.scores("hotel salt"))
    assert made.scores("hotel salt")[1] > 0


def test_neighbours_in_the_same_order_count_more_than_the_same_words_apart():
    made = index("book a flight", "flight a book", "flight and a book")
    first, second, third = made.scores("book a flight")
    assert first > second > third > 0


def test_marks_count_as_words_do():
    made = index("are you sure ? yes", "you are sure . yes", "hotel salt")
    assert made.scores("?").tolist()[1:] == [0, 0]
    assert made.scores("?")[0] > 0


def test_a_script_without_spaces_is_compared_by_characters_and_pairs():
    made = index("把句子翻译成英文", "写一首诗", "hotel")
    first, second, third = made.scores("请翻译这个句子")
    assert first > second == third == 0


def test_a_word_on_every_card_never_counts_against_a_card():
    made = index("the a", "the b", "the c")
    assert (made.scores("the") > 0).all()
    assert made.idf(np.array([3])) == pytest.approx(math.log(1 + 0.5 / 3.5))


def test_a_query_without_known_words_scores_nothing():
    assert not index("book flight", "hotel").scores("Größe ?!").any()
    assert Corpus([]).scores("book").shape == index().scores("book").shape == (0,)


def test_documents_without_words_neither_match_nor_break():
    assert index("", "").scores("book").tolist() == [0.0, 0.0]


def test_documents_are_numbered_by_the_order_asked_for_and_not_as_they_came():
    made = Corpus([part(["flight flight", "salt", "flight"], order=[1, 2, 0])])
    assert made.scores("flight") == pytest.approx(index("salt", "flight", "flight flight").scores("flight"))


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_query_of_many_postings_is_counted_piece_by_piece(at_once, monkeypatch):
    monkeypatch.setattr(bm25, "_AT_ONCE", at_once)
    documents = ["a b c", "b c d e", "c d", "f", "a f b"]
    assert index(*documents).scores("a b c d e f zzz") == pytest.approx(plain(documents, "a b c d e f"), abs=1e-9)


def test_terms_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(bm25, "_keys", lambda terms: np.array([len(term) for term in terms], dtype=np.uint64))
    documents = ["book flight", "flight", "hotel oven", ""]
    for query in ("flight", "oven hotel", "salt", "book"):
        assert index(*documents).scores(query) == pytest.approx(plain(documents, query), abs=1e-9)


WORDS = st.lists(st.sampled_from("abcdef"), max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(WORDS, min_size=1, max_size=6).filter(any), query=WORDS)
def test_scores_equal_the_plain_loop(documents, query):
    assert index(*documents).scores(query) == pytest.approx(plain(documents, query), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.lists(st.tuples(WORDS, st.booleans()), max_size=5), min_size=1, max_size=3), query=WORDS)
def test_parts_with_masked_documents_score_as_one_collection_of_those_left(parts, query):
    made = Corpus([part([text for text, _ in own], masked=[gone for _, gone in own]) for own in parts])
    documents = [document for own in parts for document in own]
    left = [text for text, gone in documents if not gone]
    assert made.document_count == len(left)
    scores = made.scores(query)
    assert not any(score for score, (_, gone) in zip(scores, documents, strict=True) if gone)
    if any(left):
        met = [score for score, (_, gone) in zip(scores, documents, strict=True) if not gone]
        assert met == pytest.approx(plain(left, query), abs=1e-9)
