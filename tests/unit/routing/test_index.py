"""The vector index finds what a plain product finds, whatever its kind, in memory and mapped from a file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import IndexInvalid
from moerge.routing.index import VectorIndex

# Limits under which 5,000 rows are of each kind.
KINDS = {"flat": {}, "graph": {"flat_limit": 100}, "lists": {"flat_limit": 100, "graph_limit": 100}}


def vectors(count: int, seed: int = 0, width: int = 16) -> np.ndarray:
    """Rows in clumps, as those of texts are: float16 unit vectors."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(1).normal(size=(40, width))
    rows = middles[rng.integers(0, 40, size=count)] + 0.7 * rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def question(seed: int, width: int = 16) -> np.ndarray:
    return vectors(1, seed + 10_000, width)[0].astype(np.float32)


def products(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    return rows.astype(np.float64) @ query.astype(np.float64)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made(kind):
    return VectorIndex.build(vectors(5_000), **KINDS[kind])


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), k=st.integers(1, 70), seed=st.integers(0, 1000))
def test_a_search_of_few_rows_equals_brute_force(count, k, seed):
    rows, query = vectors(count, seed), question(seed)
    scores, found = VectorIndex.build(rows).search(query, k)
    wanted = products(rows, query)
    assert found.tolist() == np.argsort(-wanted)[:k].tolist()
    assert scores == pytest.approx(wanted[found], abs=1e-6)


def test_ten_neighbours_are_found_as_surely_as_the_kind_promises(kind, made):
    wanted_recall = {"flat": 1.0, "graph": 0.98, "lists": 0.96}[kind]
    shares = []
    for seed in range(50):
        best = np.argsort(-products(made.rows, question(seed)))[:10]
        _, found = made.search(question(seed), 200)
        shares.append(len({*best.tolist()} & {*found[:10].tolist()}) / 10)
    assert np.mean(shares) >= wanted_recall
    assert made.exact is (kind == "flat")


def test_scores_are_those_of_the_rows_themselves_and_the_best_comes_first(made):
    scores, found = made.search(question(3), 50)
    assert scores == pytest.approx(products(made.rows, question(3))[found], abs=1e-6)
    assert (np.diff(scores) <= 0).all()
    assert len(set(found.tolist())) == len(found) == 50


def test_scores_of_any_rows_come_in_the_order_asked(made):
    asked = np.random.default_rng(5).permutation(5_000)[:3_000]
    assert made.scores(question(4), asked) == pytest.approx(products(made.rows, question(4))[asked], abs=1e-6)
    assert made.scores(question(4), asked[:0]).shape == (0,)


def test_more_than_there_is_gives_all_there_is():
    rows = vectors(7)
    assert sorted(VectorIndex.build(rows).search(question(1), 100)[1].tolist()) == list(range(7))


def test_an_empty_index_finds_nothing():
    scores, rows = VectorIndex.build(vectors(0)).search(question(1), 5)
    assert len(scores) == len(rows) == 0


def test_equal_rows_give_equal_files_and_a_mapped_file_answers_alike(kind, made, tmp_path):
    made.save(tmp_path / "one")
    VectorIndex.build(vectors(5_000), **KINDS[kind]).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = VectorIndex.open(tmp_path / "one", made.rows)
    assert again.exact == made.exact
    for seed in range(5):
        for met, wanted in zip(again.search(question(seed), 60), made.search(question(seed), 60), strict=True):
            assert np.array_equal(met, wanted)


def test_a_file_of_other_rows_or_of_no_index_is_refused(made, tmp_path):
    made.save(tmp_path / "index")
    (tmp_path / "text").write_bytes(b"no index at all")
    for name, rows in (("index", vectors(4_999)), ("index", vectors(5_000, width=8)), ("text", made.rows)):
        with pytest.raises(IndexInvalid) as caught:
            VectorIndex.open(tmp_path / name, rows)
        assert caught.value.pointer == name


def test_a_query_of_another_width_is_refused(made):
    with pytest.raises(IndexInvalid):
        made.search(np.ones(8, dtype=np.float32), 1)
