"""A segment gives back the entries it was built from, in the order of their ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import IndexInvalid
from moerge.routing.ragged import Strings
from moerge.routing.segment import Segment
from tests.unit.routing.builders import DIMENSION, crowd, entry


def built(*entries, **limits) -> Segment:
    return Segment.build(entries, dimension=DIMENSION, **limits)


def test_every_entry_comes_back_as_it_went_in():
    entries = [
        *crowd(5),
        entry("o/bare"),
        entry("o/full", examples=tuple(f"e{number}" for number in range(32)), instruction="Say.", tags=("b", "a")),
        entry("o/zh", name="翻译", description="把句子翻译成英文 \ud800", examples=("你好", "", "  ")),
    ]
    made = built(*reversed(entries))
    assert list(made.experts) == sorted(one.card.expert for one in entries)
    for wanted in entries:
        slot = made.experts.find(wanted.card.expert)
        met = made.entry(slot)
        assert (met.card, met.counts) == (wanted.card, wanted.counts)
        assert np.array_equal(met.vectors, wanted.vectors)
        assert (made.numbers[slot], made.revisions[slot]) == (wanted.card.number, wanted.card.revision)
        rows = made.rows_of(np.array([slot]))
        assert set(made.slots_of(rows).tolist()) == {slot}
        assert len(rows) == len(wanted.vectors)


def test_ids_are_in_the_order_of_their_letters_and_not_of_their_bytes_in_memory():
    ids = ["o/é", "o/z", "o/Z", "o/\U0001f600", "o/\uffff", "o", "o/"]
    assert list(built(*map(entry, ids)).experts) == sorted(ids)


def test_an_expert_may_stand_in_a_segment_once():
    with pytest.raises(IndexInvalid) as caught:
        built(entry("o/a"), entry("o/b"), entry("o/a", description="again"))
    assert caught.value.pointer == "o/a"


def test_an_empty_segment_is_possible():
    made = built()
    assert len(made) == len(made.experts) == len(made.vectors) == 0


TEXTS = st.text(alphabet=st.characters(exclude_categories=()), max_size=4)


@settings(max_examples=100, deadline=None)
@given(texts=st.sets(TEXTS, max_size=12), asked=TEXTS)
def test_packed_texts_are_found_where_a_list_has_them(texts, asked):
    ordered = sorted(texts)
    packed = Strings.of(ordered)
    assert list(packed) == ordered
    assert [packed.find(text) for text in ordered] == list(range(len(ordered)))
    assert packed.find(asked) == (ordered.index(asked) if asked in texts else -1)
    assert packed.place(asked) == sum(text < asked for text in texts)
