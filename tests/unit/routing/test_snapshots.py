"""A snapshot answers as what it was written from, and any byte that is not as written is found."""

import json
import mmap

import numpy as np
import pytest

from moerge.errors import IndexInvalid
from moerge.routing import snapshots
from moerge.routing.base import Query
from moerge.routing.segment import Segment
from moerge.routing.state import State
from tests.unit.routing.builders import DIMENSION, crowd, entry, unit

KINDS = {"flat": {}, "graph": {"flat_limit": 50}, "lists": {"flat_limit": 50, "graph_limit": 50}}


def segments(**limits):
    bases = {
        "base/a": crowd(60, base="base/a"),
        "base/b": [entry("o/zh", base="base/b", description="句子", tags=("t",))],
    }
    return {name: Segment.build(own, dimension=DIMENSION, **limits) for name, own in bases.items()}


def write(folder, made=None, **fields):
    known = {"seq": 7, "encoder_id": "enc", "dimension": DIMENSION}
    return snapshots.write(folder, segments() if made is None else made, **known | fields)


def state(found):
    return State.based_on(found, seq=7, encoder_id="enc", dimension=DIMENSION)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_snapshot_ranks_exactly_as_the_segments_in_memory(kind, tmp_path):
    made = segments(**KINDS[kind])
    opened = snapshots.open(tmp_path / "s", write(tmp_path / "s", made), encoder_id="enc")
    assert (opened.seq, opened.encoder_id, opened.dimension) == (7, "enc", DIMENSION)
    for name in made:
        assert opened.segments[name].columns.keys() == made[name].columns.keys()
        for column, values in made[name].columns.items():
            assert opened.segments[name].columns[column].dtype == values.dtype
            assert np.array_equal(opened.segments[name].columns[column], values)
    for seed in range(5):
        vector = unit(*np.random.default_rng(seed).normal(size=DIMENSION))
        query = Query(text="salt oven bank story", vector=vector)
        for strategy in ("hybrid", "dense", "bm25"):
            assert state(opened.segments).rank(query, strategy=strategy) == state(made).rank(query, strategy=strategy)


def test_columns_lie_in_the_file_and_cannot_be_written_to(tmp_path):
    opened = snapshots.open(tmp_path / "s", write(tmp_path / "s"), encoder_id="enc")
    rows = opened.segments["base/a"].vectors.rows
    owner = rows
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner.obj, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


@pytest.mark.parametrize("kind", KINDS)
def test_equal_content_gives_equal_files_whatever_the_order_it_came_in(kind, tmp_path):
    first = segments(**KINDS[kind])
    entries = [first["base/a"].entry(slot) for slot in reversed(range(60))]
    second = {"base/b": first["base/b"], "base/a": Segment.build(entries, dimension=DIMENSION, **KINDS[kind])}
    assert write(tmp_path / "one", first) == write(tmp_path / "two", second)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def names():
    return ["0.columns", "0.vectors", "1.columns", "1.vectors", "meta.json"]


def test_the_files_are_those_that_the_documentation_names(tmp_path):
    write(tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == names()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def harmed(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    else:
        place = {"first byte": 0, "middle byte": len(data) // 2, "last byte": -1}[how]
        data[place] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "first byte", "middle byte", "last byte"])
def test_a_harmed_file_is_named(name, how, tmp_path):
    digest = write(tmp_path / "s")
    harmed(tmp_path / "s" / name, how)
    with pytest.raises(IndexInvalid) as caught:
        snapshots.open(tmp_path / "s", digest, encoder_id="enc")
    assert caught.value.pointer == name
    assert caught.value.remedy


def test_a_file_too_many_is_named(tmp_path):
    digest = write(tmp_path / "s")
    (tmp_path / "s" / "2.columns").write_bytes(b"")
    with pytest.raises(IndexInvalid) as caught:
        snapshots.open(tmp_path / "s", digest, encoder_id="enc")
    assert caught.value.pointer == "2.columns"


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(IndexInvalid):
        snapshots.open(tmp_path / "none", "0" * 64, encoder_id="enc")


def test_a_snapshot_of_another_encoder_is_refused(tmp_path):
    digest = write(tmp_path / "s")
    with pytest.raises(IndexInvalid) as caught:
        snapshots.open(tmp_path / "s", digest, encoder_id="another")
    assert (caught.value.met, caught.value.wanted) == ("enc", "another")


def test_a_snapshot_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "FORMAT", "moerge-routing-index/0")
    digest = write(tmp_path / "s")
    monkeypatch.undo()
    with pytest.raises(IndexInvalid) as caught:
        snapshots.open(tmp_path / "s", digest, encoder_id="enc")
    assert caught.value.met == "moerge-routing-index/0"


def test_a_snapshot_of_one_number_is_replaced_and_who_has_the_old_one_open_keeps_it(tmp_path):
    old = snapshots.open(tmp_path / "s", write(tmp_path / "s"), encoder_id="enc")
    before = state(old.segments).rank(Query(text="salt", vector=unit(1)))
    other = {"base/a": Segment.build([entry("o/new")], dimension=DIMENSION)}
    digest = write(tmp_path / "s", other)
    assert list(snapshots.open(tmp_path / "s", digest, encoder_id="enc").segments["base/a"].experts) == ["o/new"]
    assert state(old.segments).rank(Query(text="salt", vector=unit(1))) == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_a_killed_writer_left_behind_is_no_snapshot_and_does_not_stay(tmp_path):
    (tmp_path / "s.tmp").mkdir()
    (tmp_path / "s.tmp" / "9.columns").write_bytes(b"half")
    digest = write(tmp_path / "s")
    snapshots.open(tmp_path / "s", digest, encoder_id="enc")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_meta_tells_what_the_snapshot_holds(tmp_path):
    write(tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert [(base["base_model"], base["counts"]["experts"]) for base in meta["bases"]] == [
        ("base/a", 60),
        ("base/b", 1),
    ]
    assert meta["bases"][1]["counts"]["vectors"] == 2


def test_a_segment_of_another_width_is_not_written(tmp_path):
    with pytest.raises(IndexInvalid):
        write(tmp_path / "s", dimension=DIMENSION + 1)
    assert not (tmp_path / "s").exists()


def test_an_empty_index_is_a_snapshot_too(tmp_path):
    opened = snapshots.open(tmp_path / "s", write(tmp_path / "s", {}), encoder_id="enc")
    assert opened.segments == {}
