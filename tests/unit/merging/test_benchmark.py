"""The measurement of merges runs and says what it compared."""

import argparse

import pytest

from benchmarks import merge
from moerge import merging


def test_every_merge_is_timed_and_two_of_them_beside_peft():
    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    rows = merge.run(
        parser.parse_args(["--side", "96", "--rank", "4", "--experts", "2", "--repeats", "1", "--no-peer"])
    )
    assert [row["name"] for row in rows[:2]] == ["linear, then SVD: CPU time", "linear, then SVD: extra memory"]
    assert len(rows) == 2 * len(merge.METHODS)
    assert all(row["value"] >= 0 and row["met"] is None and row["peer"] is None for row in rows)


def test_targets_hold_at_their_size_alone():
    rows = merge.rows_of("TIES, then SVD", (2.0, 1 << 20), (30.0, 1 << 30), (4096, 16, 8))
    assert [(row["unit"], row["met"]) for row in rows] == [("s", False), ("bytes", True), ("times", False)]
    assert rows[2]["value"] == 15.0
    assert all(row["met"] is None for row in merge.rows_of("TIES, then SVD", (2.0, 1), (30.0, 1), (1024, 16, 8)))


def test_ours_and_peft_merge_the_same_experts():
    size = (48, 4, 2)
    assert merge.measure_ours(merge.METHODS["TIES, then SVD"], size, 1)[0] > 0
    assert merge.measure_peft("ties_svd", size, 1)[0] > 0


@pytest.mark.parametrize("method", sorted(merging.catalogue()))
def test_every_method_can_be_measured(method):
    seconds, extra = merge.measure_ours(merge.Case(method), (48, 4, 2), 1)
    assert seconds > 0
    assert extra >= 0


def test_a_section_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(merge, "METHODS", {})
    monkeypatch.setattr(merge, "SECTIONS", {"nothing": ("benchmarks.nothing", "measure nothing")})
    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    assert merge.run(parser.parse_args(["--no-peer"])) == []
    with pytest.raises(ValueError, match=r"there is no benchmarks/nothing\.py"):
        merge.run(parser.parse_args(["--no-peer", "--nothing"]))
