"""The benchmark at scale on a few hundred vectors: what it compares with is exact, and its crowd is what it says."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import routing_scale
from moerge.embedding import DIMENSION


@pytest.fixture
def arguments(tmp_path):
    """Nine cards and seven queries with vectors from a seed, so that no encoder is needed."""
    cards = [{"id": f"e{n}", "name": f"e{n}", "description": f"word{n}", "examples": ["a b", "c"]} for n in range(9)]
    queries = [{"q": f"word{n}"} for n in range(7)]
    for name, records in (("experts", cards), ("queries", queries)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = np.random.default_rng(2).normal(size=(9 * 3 + 7, DIMENSION)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", routing_scale.unit(rows))
    parser = argparse.ArgumentParser()
    routing_scale.add_arguments(parser)
    files = ["--experts", str(tmp_path / "experts"), "--queries", str(tmp_path / "queries")]
    return parser.parse_args([*files, "--vectors", str(tmp_path / "vectors.npy"), "--sizes", "400", "--count", "5"])


def test_a_small_run_is_exact_and_tells_times_sizes_and_memory(arguments):
    rows = {row["name"].removeprefix("400 vectors, "): row for row in routing_scale.run(arguments)}
    assert rows["recall@10 against exact"]["value"] == 1.0
    assert rows["experts"]["value"] == 100
    assert rows["file of the vector index"]["value"] == pytest.approx(400 * DIMENSION * 2 / 2**20, rel=0.01)
    assert rows["memory of a serving process, after the queries"]["value"] > 10
    assert {row["target"] for row in rows.values()} == {None}


def test_the_nearest_rows_are_those_of_a_plain_product_over_several_blocks(monkeypatch):
    monkeypatch.setattr(routing_scale, "BLOCK", 32)
    rng = np.random.default_rng(3)
    rows, asked = rng.normal(size=(133, 16)).astype(np.float16), rng.normal(size=(4, 16)).astype(np.float32)
    wanted = np.argsort(-(asked.astype(np.float64) @ rows.T.astype(np.float64)), axis=1)[:, :10]
    assert np.array_equal(routing_scale.nearest(rows, asked), wanted)


def test_the_crowd_is_the_same_each_time_and_near_the_cards_but_never_on_them(arguments):
    entries, _ = routing_scale.encoded(arguments)
    first, second = (list(routing_scale.Crowd(entries, 400)) for _ in range(2))
    assert all(np.array_equal(one.vectors, two.vectors) for one, two in zip(first, second, strict=True))
    assert len({one.card.expert for one in first}) == len(first) == 100
    known = np.concatenate([entry.vectors for entry in entries])
    best = (np.concatenate([one.vectors for one in first]) @ known.T).max(axis=1)
    assert best.min() > 0.4
    assert best.max() < 0.97
