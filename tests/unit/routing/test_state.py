"""Ranking over partitions: equal to scoring every card, one base at a time, through any order of changes."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge import routing
from moerge.errors import IndexInvalid, QueryInvalid
from moerge.routing import cards
from moerge.routing.base import Query
from moerge.routing.segment import Segment
from moerge.routing.state import State
from tests.unit.routing.builders import DIMENSION, WORDS, crowd, entry, number_of, state, terms, unit


def plain(entries, query: Query, strategy: str = "hybrid") -> list[tuple[str, float]]:
    """Every entry scored by the formula of the documentation, one by one, in plain Python."""
    words = {made.card.expert: terms(cards.document(made.card)) for made in entries}
    mean = sum(map(len, words.values())) / len(words)
    scored = []
    for made in entries:
        own = words[made.card.expert]
        b = 0.0
        for term in set(terms(query.text)):
            containing = sum(term in other for other in words.values())
            count = own.count(term)
            idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
            b += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(own) / mean))
        if strategy == "bm25":
            scored.append((made.card.expert, b / (b + 60)))
            continue
        cosines = [float(np.dot(row, query.vector)) for row in made.vectors.astype(np.float64)]
        s_desc, s_cen = cosines[0], cosines[1]
        s_ex = max(cosines[2:]) if cosines[2:] else s_desc
        dense = 0.6 * s_ex + 0.2 * s_desc + 0.2 * s_cen
        scored.append((made.card.expert, dense if strategy == "dense" else 0.5 * dense + 0.5 * b / (b + 60)))
    return sorted(((expert, round(score, 6)) for expert, score in scored), key=lambda pair: (-pair[1], pair[0]))


def question(seed: int, *, vector: bool = True) -> Query:
    rng = np.random.default_rng(seed)
    row = rng.normal(size=DIMENSION)
    text = " ".join(rng.choice(WORDS, size=rng.integers(1, 5)))
    return Query(text=text, vector=(row / np.linalg.norm(row)).astype(np.float32) if vector else None)


def ranked(hits) -> list[tuple[str, float]]:
    return [(hit.expert, hit.score) for hit in hits]


def assert_same(met, wanted):
    """Same order but where two scores are equal within the arithmetic, and same scores."""
    assert dict(met) == pytest.approx(dict(wanted), abs=2e-6)
    assert [score for _, score in met] == pytest.approx([score for _, score in wanted], abs=2e-6)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 45), seed=st.integers(0, 10_000), strategy=st.sampled_from(["hybrid", "dense"]))
def test_a_ranking_equals_scoring_every_card(count, seed, strategy):
    entries = crowd(count, seed=seed)
    query = question(seed)
    hits = state(*entries).rank(query, base_model="base/a", strategy=strategy).hits
    assert_same(ranked(hits), plain(entries, query, strategy))


def test_the_score_of_one_card_equals_the_value_worked_out_by_hand():
    # cos with the examples .6 and .8 (their centroid (.6 + .8) / sqrt 2 = .98995), with the description 0.
    # Two documents of 4 words and 3 pairs and of 3 words and 2 pairs (mean 6 terms); "salt" is in one of two:
    # idf = ln(1 + 1.5 / 1.5) = .6931472; b = .6931472 * 2.2 / (1 + 1.2 * (.25 + .75 * 7 / 6)) = .6489; the score .3444.
    made = state(
        entry("o/a", name="a", description="b", examples=("salt", "c"), vectors=[unit(0, 0, 1), unit(1), unit(0, 1)]),
        entry("o/b", name="x", description="y z", vectors=[unit(0, 0, 0, 1)]),
    )
    first, second = made.rank(Query(text="salt", vector=unit(0.6, 0.8)), base_model="base/a").hits
    b = 0.6931472 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 7 / 6))
    dense = 0.6 * 0.8 + 0.2 * 0.0 + 0.2 * 0.98995
    assert (first.expert, first.number, first.revision, first.base_model) == ("o/a", number_of("o/a"), 7, "base/a")
    assert first.score == pytest.approx(0.5 * dense + 0.5 * b / (b + 60), abs=3e-4)
    assert first.parts == pytest.approx({"s_ex": 0.8, "s_desc": 0.0, "s_cen": 0.98995, "bm25": b}, abs=5e-4)
    # Two cards lower the bands by .021 (ln(1 + 668.5 / 1.5) - ln(1 + 1.5 / 1.5)) = .114, that of .39 below .3444.
    assert (first.matched_example_index, first.confidence) == (1, "medium")
    assert (second.expert, second.score, second.matched_example_index) == ("o/b", 0.0, None)


def test_the_matched_example_is_the_nearest_one():
    examples = tuple(f"e{number}" for number in range(5))
    vectors = [unit(0, 1), *(unit(1, 0.1 * number) for number in (5, 3, 1, 2, 4))]
    hit = state(entry("o/a", examples=examples, vectors=vectors)).rank(Query(text="q", vector=unit(1))).hits[0]
    assert hit.matched_example_index == 2


def test_the_first_of_two_equal_examples_is_the_matched_one():
    made = entry("o/a", examples=("x", "y"), vectors=[unit(0, 1), unit(1), unit(1)])
    assert state(made).rank(Query(text="q", vector=unit(1))).hits[0].matched_example_index == 0


@pytest.mark.parametrize("count", [0, 1, 32, 40])
def test_cards_with_few_and_many_examples_stand_side_by_side(count):
    texts = tuple(f"text {number}" for number in range(count))
    entries = [entry("o/many", examples=texts, seed=1), entry("o/none", seed=2), entry("o/two", examples=("a", "b"))]
    query = question(7)
    assert_same(ranked(state(*entries).rank(query).hits), plain(entries, query))


def columns(entries, query, **options):
    """Candidates of all these entries, by expert."""
    numbers = np.array([made.card.number for made in entries])
    made = state(*entries).partitions["base/a"].find(query, allow=numbers, **options).candidates
    return made, {expert: place for place, expert in enumerate(made.experts)}


def test_the_instruction_has_a_cosine_of_its_own_and_competes_for_no_other_part():
    rows = [unit(0, 1), unit(1, 1), unit(1, 3)]
    plain = entry("o/plain", examples=("x", "y"), vectors=rows)
    written = entry("o/written", examples=("x", "y"), instruction="i", vectors=[*rows, unit(1)])
    bare = entry("o/bare", instruction="i", vectors=[unit(0, 1), unit(1)])
    made, at = columns([plain, written, bare], Query(text="q", vector=unit(1)))
    assert made.s_ins[[at["o/plain"], at["o/written"], at["o/bare"]]] == pytest.approx([0, 1, 1])
    for part in ("s_ex", "s_desc", "s_cen", "matched"):
        assert getattr(made, part)[at["o/written"]] == getattr(made, part)[at["o/plain"]]
    assert made.s_ex[at["o/written"]] == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert (made.s_ex[at["o/bare"]], made.s_cen[at["o/bare"]], made.matched[at["o/bare"]]) == (0, 0, -1)


def test_a_tag_stands_where_the_centroids_of_its_experts_do():
    entries = [
        entry("o/a", examples=("x",), tags=("cook", "bake"), vectors=[unit(0, 0, 1), unit(1)]),
        entry("o/b", tags=("cook", "cook"), vectors=[unit(0, 1)]),
        entry("o/c", vectors=[unit(0, 1)]),
    ]
    made, at = columns(entries, Query(text="q", vector=unit(1)), with_tags=True)
    # Tags in order: bake with o/a alone (cosine 1), cook with the mean of o/a and o/b (cosine sqrt 1/2).
    assert made.tag_cosines == pytest.approx([1, math.sqrt(0.5)], abs=1e-3)
    assert made.tagged.tolist() == sorted([[at["o/a"], 0], [at["o/a"], 1], [at["o/b"], 1]])


def test_tags_are_told_to_none_that_does_not_ask_and_to_none_without_vector():
    entries = [entry("o/a", tags=("cook",))]
    for query, options in ((question(1), {}), (question(1, vector=False), {"with_tags": True})):
        made, _ = columns(entries, query, **options)
        assert (made.tag_cosines.shape, made.tagged.shape) == ((0,), (0, 2))


def test_a_tag_that_nobody_carries_any_more_is_gone():
    grown = state(entry("o/a", tags=("cook", "bake")), entry("o/b", tags=("cook",)))
    left = grown.changed(seq=2, removed={"o/a"}).partitions["base/a"].find(question(1), with_tags=True).candidates
    assert (len(left.tag_cosines), left.tagged.tolist()) == (1, [[0, 0]])


def test_a_tag_loses_what_experts_gave_it_that_left_or_changed():
    vectors = {name: [unit(*np.eye(4)[place])] for place, name in enumerate("abcd")}
    first = [entry(f"o/{name}", tags=("cook", name), vectors=vectors[name]) for name in "abc"]
    changed = entry("o/b", tags=("cook", "new"), vectors=vectors["d"])
    grown = snapshot(*first).changed(seq=2, removed={"o/a"}, put=[changed])
    query = Query(text="q", vector=unit(1, 2, 3, 4))
    made = grown.partitions["base/a"].find(query, with_tags=True).candidates
    # Tags in order: c (o/c alone), cook (the mean of the third and the fourth axis), new (o/b alone).
    length = math.sqrt(30)
    assert made.tag_cosines == pytest.approx([3 / length, 7 / length / math.sqrt(2), 4 / length], abs=1e-3)
    assert made.tagged.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]


def test_equal_scores_are_ordered_by_expert_id():
    twins = [entry(f"o/{name}", examples=("x",), vectors=[unit(1, 1), unit(1, 2)]) for name in "dbeac"]
    filler = crowd(20, seed=5)
    hits = state(*filler[:9], *twins, *filler[9:]).rank(Query(text="x", vector=unit(1, 2)), limit=5).hits
    assert [hit.expert for hit in hits] == ["o/a", "o/b", "o/c", "o/d", "o/e"]
    assert len({hit.score for hit in hits}) == 1


def test_equal_scores_on_two_bases_are_ordered_by_expert_id_too():
    twins = [entry(f"o/{name}", base=f"base/{name}", vectors=[unit(1, 1)]) for name in "dbeac"]
    hits = state(*twins).rank(Query(text="zzz", vector=unit(1, 2))).hits
    assert [hit.expert for hit in hits] == ["o/a", "o/b", "o/c", "o/d", "o/e"]


def test_equal_bm25_scores_at_the_edge_of_the_candidates_keep_the_smaller_ids():
    twins = [entry(f"o/{number:02d}", description="salt") for number in range(30)]
    made = state(*twins[4:]).changed(seq=2, put=twins[:4])
    hits = made.rank(Query(text="salt"), depth=7).hits
    assert [hit.expert for hit in hits] == [f"o/{number:02d}" for number in range(7)]


def test_candidates_are_the_nearest_by_vector_and_the_best_by_word():
    near = [entry(f"near/{number}", vectors=[unit(1, 0.01 * number)]) for number in range(4)]
    worded = [entry(f"word/{number}", description="salt " * (number + 1), vectors=[unit(0, 1)]) for number in range(4)]
    far = [entry(f"far/{number}", vectors=[unit(-1)]) for number in range(4)]
    ranking = state(*near, *worded, *far).rank(Query(text="salt", vector=unit(1)), depth=3)
    assert {hit.expert for hit in ranking.hits} == {"near/0", "near/1", "near/2", "word/1", "word/2", "word/3"}
    assert not ranking.exhausted


def test_depth_counts_experts_and_not_vectors():
    crowded = entry("o/a", examples=tuple("abcdefghijkl"), vectors=[unit(1, 0.001 * number) for number in range(13)])
    others = [entry(f"o/b{number}", vectors=[unit(0.5, 1, number)]) for number in range(4)]
    ranking = state(crowded, *others).rank(Query(text="zzz", vector=unit(1)), depth=3)
    assert [hit.expert for hit in ranking.hits] == ["o/a", "o/b0", "o/b1"]


def test_without_query_vector_words_alone_decide_and_the_ranking_says_so():
    entries = crowd(30, seed=4)
    query = question(4, vector=False)
    ranking = state(*entries).rank(query)
    assert ranking.strategy.name == "bm25"
    wanted = [pair for pair in plain(entries, query, "bm25") if pair[1] > 0]
    assert ranked(ranking.hits) == wanted
    assert all(set(hit.parts) == {"bm25"} and hit.matched_example_index is None for hit in ranking.hits)


def test_a_limit_keeps_the_best():
    entries = crowd(30, seed=8)
    everything = state(*entries).rank(question(8)).hits
    assert state(*entries).rank(question(8), limit=4).hits == everything[:4]


def test_the_threshold_is_that_of_the_largest_base_asked():
    made = state(*crowd(3, base="base/a"), *crowd(40, base="base/b"))
    spec = made.rank(question(1)).strategy
    assert (
        made.rank(question(1)).min_score == made.rank(question(1), base_model="base/b").min_score == spec.threshold(40)
    )
    assert made.rank(question(1), base_model="base/a").min_score == spec.threshold(3)
    assert made.rank(question(1), base_model="base/none").min_score == spec.threshold(1)


def test_a_ranking_says_whether_more_could_be_found():
    made = state(*crowd(30, seed=1))
    assert not made.rank(question(1), limit=29, depth=30).exhausted
    assert made.rank(question(1), limit=30, depth=30).exhausted
    assert not made.rank(question(1), depth=29).exhausted


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(QueryInvalid) as caught:
        state().rank(question(1), strategy="oracle")
    assert caught.value.pointer == "/strategy"
    assert "hybrid" in caught.value.wanted


def test_only_allowed_experts_are_candidates_however_far_they_are():
    entries = crowd(80, seed=2)
    query = question(2)
    allowed = {"base/a/003", "base/a/050", "base/a/079"}
    ranking = state(*entries).rank(query, allow=[1, *map(number_of, allowed)], depth=1)
    wanted = [pair for pair in plain(entries, query) if pair[0] in allowed]
    assert_same(ranked(ranking.hits), wanted)
    assert ranking.exhausted


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_base_model_is_a_wall(seed):
    first, second = crowd(20, base="base/a", seed=seed), crowd(15, base="base/b", seed=seed + 1)
    query = question(seed)
    both = state(*first, *second)
    assert_same(ranked(both.rank(query, base_model="base/a").hits), plain(first, query))
    assert {hit.base_model for hit in both.rank(query, base_model="base/b").hits} == {"base/b"}
    everything = ranked(both.rank(query).hits)
    assert_same(everything, sorted(plain(first, query) + plain(second, query), key=lambda pair: -pair[1]))


def test_an_unknown_base_model_has_no_experts():
    assert state(*crowd(3)).rank(question(1), base_model="base/z").hits == ()


def test_no_experts_at_all_give_an_empty_ranking():
    ranking = state().rank(question(1))
    assert ranking.hits == ()
    assert ranking.exhausted


def snapshot(*entries, **limits) -> State:
    """A state whose entries all stand in segments, as after opening a snapshot."""
    bases = {made.card.base_model for made in entries}
    segments = {
        base: Segment.build((made for made in entries if made.card.base_model == base), dimension=DIMENSION, **limits)
        for base in bases
    }
    return State.based_on(segments, seq=1, encoder_id="test", dimension=DIMENSION)


def content(number: int, where: str, kind: int) -> cards.Entry:
    """Expert `number` on base a or b with one of some contents; kinds 0 and 4 share words and vectors."""
    word = WORDS[kind % 4]
    return entry(
        f"o/{number:02d}",
        base=f"base/{where}",
        description=word,
        examples=tuple(WORDS[kind : kind + kind % 3]),
        tags=(word, WORDS[kind % 2]),
        seed=kind % 4 - number_of(f"o/{number:02d}"),
    )


CONTENTS = st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.integers(0, 7))


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(CONTENTS, max_size=10, unique_by=lambda drawn: drawn[0]),
    steps=st.lists(st.one_of(CONTENTS, st.integers(0, 9)), max_size=12),
    depth=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_snapshot_with_changes_ranks_as_a_fresh_one_and_as_scoring_every_card(first, steps, depth, seed):
    """Each step puts an expert on a base with some content, or takes out the expert of that number."""
    alive = {f"o/{drawn[0]:02d}": content(*drawn) for drawn in first}
    grown = snapshot(*alive.values())
    for seq, step in enumerate(steps, start=2):
        if isinstance(step, int):
            gone = alive.pop(f"o/{step:02d}", None)
            number = {gone.card.number} if gone and step % 2 else ()
            grown = grown.changed(seq=seq, removed=() if number else {f"o/{step:02d}"}, withdrawn=number)
        else:
            made = content(*step)
            alive[made.card.expert] = made
            grown = grown.changed(seq=seq, put=[made])
        assert grown.seq == seq
    fresh = snapshot(*alive.values())
    assert len(grown) == len(alive)
    assert {name: part.experts() for name, part in grown.partitions.items()} == {
        name: part.experts() for name, part in fresh.partitions.items()
    }
    query = question(seed)
    for base, strategy in (("base/a", "hybrid"), ("base/b", "dense"), (None, "two_stage")):
        if strategy not in routing.catalogue():
            continue
        met = grown.rank(query, base_model=base, strategy=strategy, depth=depth).hits
        wanted = fresh.rank(query, base_model=base, strategy=strategy, depth=depth).hits
        assert_same(ranked(met), ranked(wanted))
        assert [hit.expert for hit in met] == [hit.expert for hit in wanted]
    mine = [made for made in alive.values() if made.card.base_model == "base/a"]
    if mine:
        assert_same(ranked(grown.rank(query, base_model="base/a", depth=20).hits), plain(mine, query))


@pytest.fixture(scope="module", params=[{}, {"flat_limit": 50}, {"flat_limit": 50, "graph_limit": 50}])
def filtered(request):
    """280 experts in a segment of each kind of which 20 are gone, 20 beside it, and 40 on another base."""
    entries, others = crowd(300, seed=11), crowd(40, base="base/b", seed=12)
    made = snapshot(*entries[:280], *others, **request.param)
    return made.changed(seq=2, put=entries[280:], removed={e.card.expert for e in entries[:20]}), entries, others


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3, 0.9])
def test_a_filter_gives_the_best_of_those_that_pass_and_never_one_of_another_base(filtered, share):
    made, entries, others = filtered
    rng = np.random.default_rng(int(100 * share))
    passing = {e.card.expert: e.card.number for e in entries[20:] if rng.random() < share}
    numbers = [*passing.values(), *(e.card.number for e in [*others, *entries[:20]])]
    for seed in range(3):
        query = question(seed)
        hits = made.rank(query, base_model="base/a", strategy="dense", allow=numbers, limit=10).hits
        wanted = [pair for pair in plain(entries[20:], query, "dense") if pair[0] in passing]
        assert_same(ranked(hits), wanted[:10])


def test_where_a_search_finds_too_few_that_pass_all_of_them_are_compared():
    """The two thousand nearest experts do not pass, which no search that stops early gets beyond."""
    rng = np.random.default_rng(1)
    near = [entry(f"near/{n:04d}", vectors=[unit(1, *(0.1 * rng.normal(size=7)))]) for n in range(1500)]
    far = [entry(f"far/{n:03d}", vectors=[unit(-1, *(0.1 * rng.normal(size=7)))]) for n in range(400)]
    query = Query(text="zzz", vector=unit(1))
    for limits in ({"flat_limit": 50}, {"flat_limit": 50, "graph_limit": 50}):
        made = snapshot(*near, *far, **limits)
        hits = made.rank(query, strategy="dense", allow=[e.card.number for e in far], limit=20).hits
        cosines = {e.card.expert: round(float(e.vectors[0] @ query.vector), 6) for e in far}
        wanted = sorted(cosines.items(), key=lambda pair: (-pair[1], pair[0]))[:20]
        assert_same(ranked(hits), wanted)


def test_more_equal_experts_than_candidates_are_still_ordered_by_id():
    twins = [entry(f"o/{number:03d}", vectors=[unit(1, 1)]) for number in range(400)]
    rng = np.random.default_rng(0)
    first, later = (rng.permutation(np.array(some, dtype=object)) for some in (twins[1:300], [twins[0], *twins[300:]]))
    made = snapshot(*first).changed(seq=2, put=later, removed=["o/003"])
    for words in ("zzz", "name"):
        hits = made.rank(Query(text=words, vector=unit(1, 1)), limit=4).hits
        assert [hit.expert for hit in hits] == ["o/000", "o/001", "o/002", "o/004"]


def test_two_states_on_one_segment_do_not_disturb_each_other():
    first = snapshot(*crowd(20, seed=3))
    second = first.changed(seq=2, removed={"base/a/003"}, put=[entry("base/a/004", description="salt")])
    third = first.changed(seq=2, put=[entry("base/a/new", description="oven")])
    assert first.partitions["base/a"].base is second.partitions["base/a"].base is third.partitions["base/a"].base
    assert len(first), len(second) == (20, 19)
    assert "base/a/003" not in second.partitions["base/a"].experts()
    assert "base/a/003" in third.partitions["base/a"].experts()
    assert second.partitions["base/a"].card("base/a/004").description == "salt"
    assert first.partitions["base/a"].card("base/a/004").description != "salt"
    with pytest.raises(KeyError):
        second.partitions["base/a"].entry("base/a/003")


def test_a_renamed_expert_leaves_nothing_behind_under_its_old_name():
    old = entry("o/old", description="salt")
    renamed = cards.restored(replace(old.card, expert="o/new", base_model="base/b"), old.vectors.astype(np.float16))
    for made in (snapshot(old, *crowd(3)), state(old, *crowd(3))):
        after = made.changed(seq=2, put=[renamed])
        assert "o/old" not in after.partitions["base/a"].experts()
        assert after.partitions["base/b"].experts() == ("o/new",)
        assert len(after) == len(made)


def test_a_name_that_went_to_another_expert_belongs_to_that_one_alone():
    taken = replace(entry("o/a").card, number=99, description="oven")
    made = snapshot(entry("o/a", description="salt"), *crowd(3))
    after = made.changed(seq=2, put=[cards.restored(taken, entry("o/a").vectors.astype(np.float16))])
    assert (after.partitions["base/a"].card("o/a").number, len(after)) == (99, 4)
    assert len(after.changed(seq=3, withdrawn={number_of("o/a")})) == 4
    assert len(after.changed(seq=3, withdrawn={99})) == 3


def test_experts_without_a_number_do_not_replace_each_other():
    bare = [cards.restored(replace(made.card, number=0), made.vectors.astype(np.float16)) for made in crowd(4)]
    made = state(*bare[:2]).changed(seq=2, put=bare[2:], withdrawn={0})
    assert len(made) == 4


def test_the_overlay_counts_each_expert_that_differs_from_the_snapshot_once():
    made = snapshot(*crowd(20))
    assert (made.overlay_count, state(*crowd(7)).overlay_count) == (0, 7)
    changed = made.changed(seq=2, removed={"base/a/001", "nobody"}, put=[entry("base/a/002"), entry("o/new")])
    assert changed.overlay_count == 3
    assert changed.changed(seq=3, put=[entry("o/new", description="again")]).overlay_count == 3
    assert changed.changed(seq=3, removed={"o/new", "base/a/002"}).overlay_count == 2


def test_a_change_that_concerns_one_base_leaves_the_others_as_they_are():
    made = snapshot(*crowd(5), *crowd(5, base="base/b"))
    after = made.changed(seq=2, put=[entry("o/new", base="base/b")], removed={"nobody"})
    assert after.partitions["base/a"] is made.partitions["base/a"]
    assert after.partitions["base/b"] is not made.partitions["base/b"]


def test_a_base_whose_last_expert_left_is_gone():
    assert set(snapshot(entry("o/a"), entry("o/b", base="base/b")).changed(seq=2, removed={"o/a"}).partitions) == {
        "base/b"
    }


def test_a_removed_expert_is_never_returned_and_its_words_no_longer_count():
    entries = crowd(12, seed=6)
    gone = entries[4].card.expert
    left = state(*entries).changed(seq=2, removed={gone, "nobody"})
    query = question(6)
    assert_same(ranked(left.rank(query, depth=100).hits), plain([e for e in entries if e.card.expert != gone], query))


def test_an_edited_card_no_longer_matches_its_old_words_and_vectors():
    old = entry("o/a", description="salt", examples=("oven", "bank"), vectors=[unit(1), unit(1), unit(1)])
    new = entry("o/a", description="joke", vectors=[unit(0, 1)])
    edited = state(old, *crowd(5)).changed(seq=2, put=[new])
    hits = {hit.expert: hit for hit in edited.rank(Query(text="salt oven", vector=unit(1)), depth=99).hits}
    assert hits["o/a"].parts == {"bm25": 0.0, "s_ex": 0.0, "s_desc": 0.0, "s_cen": 0.0}
    assert len(edited) == 6


def test_a_state_that_others_still_read_does_not_change():
    before = state(*crowd(10, seed=3))
    answer = before.rank(question(3))
    before.changed(seq=2, removed={f"base/a/{number:03d}" for number in range(5)})
    before.changed(seq=2, removed={"base/a/001"}, put=[entry("base/a/002", description="salt")])
    assert before.rank(question(3)) == answer
    assert (before.seq, len(before)) == (1, 10)


def test_an_encoder_with_thresholds_of_its_own_is_answered_by_them_also_after_a_change():
    own = {"dense": {"min_score": 0.7, "relief": 0.0, "medium": 0.75, "high": 0.9}}
    made = State(encoder_id="test", dimension=DIMENSION, thresholds=own).changed(
        seq=1, put=[entry("o/a", vectors=[unit(1)])]
    )
    made = made.changed(seq=2, put=[entry("o/b", vectors=[unit(0, 1)])])
    vector = np.zeros(DIMENSION, dtype=np.float32)
    vector[:2] = 0.8, 0.6
    ranking = made.rank(Query(text="", vector=vector), strategy="dense")
    assert ranking.min_score == 0.7
    # 0.8 and 0.6 against medium .75 and high .9, without any relief among two experts.
    assert [(hit.expert, hit.confidence) for hit in ranking.hits] == [("o/a", "medium"), ("o/b", "low")]
    assert made.rank(Query(text="", vector=vector), strategy="centroid").min_score < 0.7


def test_vectors_of_another_width_do_not_enter():
    with pytest.raises(IndexInvalid):
        State(encoder_id="test", dimension=16).changed(seq=1, put=[entry("o/a")])


def test_other_scripts_and_very_long_texts_are_ranked_like_any_other():
    chinese = entry("o/zh", name="翻译", description="把句子翻译成英文", examples=("你好",))
    long = entry("o/long", description="salt " * 10_000 + "needle")
    made = state(chinese, long, *crowd(3))
    assert made.rank(Query(text="needle")).hits[0].expert == "o/long"
    assert made.rank(Query(text="你好", vector=chinese.vectors[2])).hits[0].expert == "o/zh"
    assert Counter(long.counts)["salt"] == 10_000
