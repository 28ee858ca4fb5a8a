"""The vector index finds what a plain product finds, before and after changes and after a round over disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import IndexInvalid
from moerge.routing.index import VectorIndex


def vectors(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute(rows: dict[int, np.ndarray], query: np.ndarray, k: int) -> list[int]:
    return sorted(rows, key=lambda number: -float(rows[number] @ query))[:k]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), k=st.integers(1, 70), seed=st.integers(0, 1000), data=st.data())
def test_a_search_equals_brute_force_after_adding_and_removing(count, k, seed, data):
    rows = vectors(count + 5, seed)
    ids = np.arange(count) * 1_000_000_007
    index = VectorIndex.build(rows[:count], ids)
    gone = data.draw(st.sets(st.sampled_from(ids.tolist()), max_size=count))
    assert index.remove(np.array([*gone, 5], dtype=np.int64)) == len(gone)
    index.add(rows[count:], np.arange(5) + 10)
    left = {int(number): row for number, row in zip(ids, rows, strict=False) if number not in gone}
    left |= {number + 10: row for number, row in enumerate(rows[count:])}
    query = vectors(1, seed + 1)[0]
    scores, found = index.search(query, k)
    assert found.tolist() == brute(left, query, k)
    assert scores == pytest.approx([left[number] @ query for number in found.tolist()], abs=1e-6)
    assert len(index) == len(left)


def test_an_empty_index_finds_nothing():
    scores, ids = VectorIndex(16).search(vectors(1)[0], 5)
    assert len(scores) == len(ids) == 0


def test_a_copy_keeps_nothing_in_common():
    first = VectorIndex.build(vectors(3), np.arange(3))
    second = first.copy()
    second.remove(np.array([0]))
    second.add(vectors(2, 9), np.array([7, 8]))
    assert sorted(first.search(vectors(1)[0], 9)[1]) == [0, 1, 2]
    assert sorted(second.search(vectors(1)[0], 9)[1]) == [1, 2, 7, 8]


def test_a_saved_index_answers_alike(tmp_path):
    index = VectorIndex.build(vectors(20), np.arange(20) + 100)
    digest = index.save(tmp_path / "index")
    again = VectorIndex.load(tmp_path / "index", digest)
    assert again.dimension == 16
    assert again.search(vectors(1, 4)[0], 20)[1].tolist() == index.search(vectors(1, 4)[0], 20)[1].tolist()
    again.remove(np.array([100]))
    assert len(again) == 19


def test_a_flipped_byte_in_a_saved_index_is_found(tmp_path):
    path = tmp_path / "index"
    digest = VectorIndex.build(vectors(20), np.arange(20)).save(path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(IndexInvalid) as caught:
        VectorIndex.load(path, digest)
    assert caught.value.wanted == digest


def test_vectors_of_another_width_are_refused():
    index = VectorIndex(16)
    with pytest.raises(IndexInvalid):
        index.add(np.ones((1, 8), dtype=np.float32), np.array([1]))
    with pytest.raises(IndexInvalid):
        index.search(np.ones(8, dtype=np.float32), 1)
    assert len(index) == 0
