"""Whatever the bytes, parsing a header ends in a header or in HeaderInvalid, and never where the library differs."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from moerge.errors import HeaderInvalid
from moerge.tensors import files, header
from moerge.tensors.header import ITEM_BYTES, WEIGHT_DTYPES

names = st.text("abAB01_.-", min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
metadata = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(WEIGHT_DTYPES)), st.lists(st.integers(1, 4), max_size=3)), max_size=5
)


def build(described, extra):
    """A valid file of these tensors (name -> dtype, shape), in the order given."""
    entries, position = {"__metadata__": extra} if extra else {}, 0
    for name, (dtype, shape) in described.items():
        end = position + int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(position)


def ours(data):
    try:
        return header.parse(data, len(data))
    except HeaderInvalid:
        return None


def theirs(data):
    try:
        return {name: (found["dtype"], tuple(found["shape"]), len(found["data"])) for name, found in deserialize(data)}
    except SafetensorError:
        return None


def check(data):
    """What we accept, the library accepts with the same meaning; anything else is HeaderInvalid."""
    found = ours(data)
    if found is not None:
        meant = {name: (info.dtype, info.shape, info.end - info.start) for name, info in found.tensors.items()}
        assert theirs(data) == meant
    return found


@given(tensors, metadata)
@settings(deadline=None, max_examples=150)
def test_valid_files_are_read_as_the_library_reads_them(described, extra):
    found = check(build(described, extra))
    assert found is not None
    assert found.metadata == extra
    assert {name: (info.dtype, list(info.shape)) for name, info in found.tensors.items()} == described


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_bytes_end_in_a_header_or_in_header_invalid(data):
    check(data)


@given(st.binary(max_size=120), st.binary(max_size=20))
@settings(deadline=None, max_examples=200)
def test_any_header_text_ends_in_a_header_or_in_header_invalid(text, data):
    check(struct.pack("<Q", len(text)) + b"{" + text + data)
    check(struct.pack("<Q", len(text) + 1) + b"{" + text + data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(names | st.just("__metadata__") | st.text(max_size=4), values, max_size=4))
@settings(deadline=None, max_examples=200)
def test_json_of_any_structure_ends_in_a_header_or_in_header_invalid(structure):
    text = json.dumps(structure).encode()
    check(struct.pack("<Q", len(text)) + text + bytes(4))


@given(tensors, st.data())
@settings(deadline=None, max_examples=300)
def test_a_valid_file_with_a_few_bytes_changed_never_fools_one_reader_only(described, data):
    good = bytearray(build(described, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(good) - 1))
        good[position] = data.draw(st.sampled_from(list(b'0123456789"{}[],:-.eE \\ufF')) | st.integers(0, 255))
    check(bytes(good))
    cut = data.draw(st.integers(0, len(good)))
    check(bytes(good[:cut]))


@given(
    st.dictionaries(
        names,
        st.tuples(st.sampled_from(["F64", "F32", "F16", "BF16"]), st.lists(st.integers(1, 3), max_size=3)),
        max_size=4,
    ),
    metadata,
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=100)
def test_what_we_write_is_read_back_bit_for_bit(tmp_path_factory, described, extra, seed):
    rng = np.random.default_rng(seed)
    made = {
        name: files.to_dtype(rng.normal(size=shape).astype(np.float32), dtype)
        for name, (dtype, shape) in described.items()
    }
    path = tmp_path_factory.mktemp("fuzz") / "x"
    files.write(path, made, extra)
    found = header.read(path)
    files.check_agreement(path, found)
    assert found.metadata == extra
    with files.open_file(path) as file:
        for name, tensor in made.items():
            stored = tensor.bits if isinstance(tensor, files.BF16) else tensor
            assert file.raw(name) == np.asarray(stored).tobytes()
            assert file.info(name).dtype == described[name][0]


def test_the_corpus_of_lies_about_length_is_refused():
    good = build({"a": ("F32", [2])}, {})
    for length in (0, 1, 7, len(good), 2**31, 2**63, 2**64 - 1):
        with pytest.raises(HeaderInvalid):
            header.parse(struct.pack("<Q", length) + good[8:], len(good))
