"""What of a card is encoded, what BM25 reads, and how its vectors are joined."""

import numpy as np
import pytest

from moerge.errors import IndexInvalid
from moerge.routing import cards
from moerge.routing.cards import Card
from tests.unit.routing.builders import DIMENSION, unit


def card(**fields):
    return Card(**({"expert": "o/e", "base_model": "b", "name": "n"} | fields))


def test_terms_are_words_marks_and_pairs_of_neighbours():
    assert cards.tokens("It's GPT-4_2nd?\n Über") == [
        "it", "'", "s", "gpt", "-", "4", "_", "2nd", "?", "ü", "ber",
        "it '", "' s", "s gpt", "gpt -", "- 4", "4 _", "_ 2nd", "2nd ?", "? ü", "ü ber",
    ]  # fmt: skip
    assert cards.tokens("one") == ["one"]
    assert cards.tokens(" \n") == []


def test_a_name_is_read_in_plain_words_however_its_words_are_joined():
    names = ("bank help desk", "bank-help_desk", "bank.help--desk")
    assert {cards.document(card(name=name)) for name in names} == {cards.document(card(name=names[0]))}
    assert {cards.texts(card(name=name)) for name in names} == {("bank help desk.",)}


def test_what_no_index_can_store_is_no_term():
    assert cards.tokens("a\ud83d\0\x07b") == ["a", "b", "a b"]


def test_the_name_and_description_are_one_text_and_each_example_another():
    made = cards.texts(card(name="bank-help_desk.v2", description="Answers.", examples=("a", "b")))
    assert made == ("bank help desk v2. Answers.", "a", "b")


def test_a_written_instruction_is_the_last_text_and_no_words_of_the_document():
    made = card(description="d", examples=("x",), instruction="Translate it.")
    assert cards.texts(made) == ("n. d", "x", "Translate it.")
    assert "translate" not in cards.tokens(cards.document(made))
    assert cards.texts(card(instruction=" \n")) == ("n.",)


def test_an_empty_description_leaves_the_name():
    assert cards.texts(card(name="kitchen")) == ("kitchen.",)


def test_blank_examples_do_not_count_and_neither_does_the_thirty_third():
    many = card(examples=("", "  \n", *(f"example {number}" for number in range(40))))
    assert cards.used_examples(many) == tuple(f"example {number}" for number in range(32))
    assert len(cards.texts(many)) == 33


def test_the_document_keeps_a_long_description_whole():
    long = "word " * 10_000 + "needle"
    met = cards.tokens(cards.document(card(description=long, examples=("hay",))))
    assert met.count("word") == 10_000
    assert met[-1] == "needle hay"


def test_the_digest_changes_with_the_texts_and_with_nothing_else():
    first = card(description="d", examples=("x", "y"))
    assert cards.digest(first) == cards.digest(
        card(description="d", examples=("x", "y", " "), revision=2, expert="o/f")
    )
    others = [
        card(description="d", examples=("y", "x")),
        card(description="d", examples=("xy",)),
        card(description="e", examples=("x", "y")),
        card(name="m", description="d", examples=("x", "y")),
        card(description="d", examples=("x",), instruction="y"),
        card(description="d", examples=("x", "y"), instruction="y"),
    ]
    assert len({cards.digest(other) for other in [first, *others]}) == 7


def test_the_centroid_is_the_normalised_mean():
    assert cards.centroid(np.array([unit(1, 0), unit(0, 1)])) == pytest.approx(unit(1, 1), abs=1e-7)
    assert cards.centroid(np.array([unit(1, 0), unit(1, 0), unit(0, 1)])) == pytest.approx(unit(2, 1), abs=1e-7)


def test_opposite_examples_have_no_centroid_and_no_nan():
    assert not cards.centroid(np.array([unit(1), unit(-1)])).any()


def test_rows_of_an_entry_are_description_centroid_examples():
    made = cards.entry(card(examples=("a", "b")), np.array([unit(0, 0, 1), unit(1), unit(0, 1)]))
    assert made.vectors.shape == (4, DIMENSION)
    wanted = np.array([unit(0, 0, 1), unit(1, 1), unit(1), unit(0, 1)])
    assert made.vectors == pytest.approx(wanted, abs=5e-4)


def test_without_examples_the_description_stands_for_the_centroid():
    made = cards.entry(card(), np.array([unit(3, 4)]))
    assert made.vectors == pytest.approx(np.array([unit(3, 4)] * 2), abs=5e-4)


@pytest.mark.parametrize("examples", [(), ("a",), ("a", "b")])
def test_the_instruction_is_the_last_row_and_no_part_of_the_centroid(examples):
    rows = [unit(0, 0, 1), unit(1), unit(0, 1)][: 1 + len(examples)]
    plain = cards.entry(card(examples=examples), np.array(rows))
    made = cards.entry(card(examples=examples, instruction="i"), np.array([*rows, unit(0, 0, 0, 1)]))
    assert np.array_equal(made.vectors[:-1], plain.vectors)
    assert made.vectors[-1] == pytest.approx(unit(0, 0, 0, 1))
    assert np.array_equal(cards.restored(made.card, made.vectors.astype(np.float16)).vectors, made.vectors)


def test_an_entry_is_the_same_after_storing_its_rows_as_float16():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(4, DIMENSION))
    made = cards.entry(
        card(examples=("a", "b", "c")), (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f4")
    )
    again = cards.restored(made.card, made.vectors.astype(np.float16))
    assert np.array_equal(again.vectors, made.vectors)
    assert again.counts == made.counts


def test_an_entry_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        cards.entry(card(), np.array([unit(1)])).vectors[0, 0] = 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_number_of_vectors_is_refused(rows):
    with pytest.raises(IndexInvalid) as caught:
        cards.entry(card(examples=("a",)), np.ones((rows, DIMENSION), dtype=np.float32))
    assert caught.value.pointer == "o/e"
    with pytest.raises(IndexInvalid):
        cards.restored(card(examples=("a",)), np.ones((rows + 1, DIMENSION), dtype=np.float16))
