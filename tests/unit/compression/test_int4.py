"""The safe tier: a plain decoder of its own reads what it writes, rows lose at most half a step, bad files are refused."""

import hashlib
import json
import struct
import zlib

import numpy as np
import pytest

from moerge.compression import open_any
from moerge.compression.codecs import int4
from moerge.errors import EncodedInvalid
from moerge.tensors.files import BF16
from tests.unit.compression import forge, reference, samples

PIECE = reference.PIECE


def slow_decode(data, base=None):
    """name -> (dtype, shape, values), in Python loops and from the format's description alone."""
    _, tensors = reference.shell(data)
    rows = json.loads(zlib.decompress(tensors["manifest"][2]))
    bits = [value[0] << 16 for value in struct.iter_unpack("<H", tensors["scales"][2])]
    scales = [struct.unpack("<f", struct.pack("<I", value))[0] for value in bits]
    codes, left = b"", sum((int(np.prod(row[2])) + 1) // 2 for row in rows)
    packed = tensors["codes"][2]
    for (length,) in struct.iter_unpack("<q", tensors["codes_len"][2]):
        piece, packed, wanted = packed[:length], packed[length:], min(PIECE, left)
        codes += piece if length == wanted else zlib.decompress(piece, -15)
        left -= wanted
    out = {}
    for name, dtype, shape, init in rows:
        size = int(np.prod(shape))
        count = 0 if size == 0 else shape[0] if len(shape) > 1 else 1
        values = []
        for index in range(size):
            byte = codes[index // 2]
            step = (byte >> 4 if index % 2 else byte & 15) - 8
            start = base[name][index] if init == "base" else init
            # Sums and products are those of float32.
            exact = np.float32(np.float32(step) * np.float32(scales[index // (size // count)])) + np.float32(start)
            values.append(reference.rounded(float(exact), dtype))
        codes, scales = codes[(size + 1) // 2 :], scales[count:]
        out[name] = (dtype, tuple(shape), values)
    assert codes == b""
    assert scales == []
    return out


def tensors():
    rng = np.random.default_rng(3)
    made = {f"m.{name}": rng.normal(0, 0.02, shape) for name, shape in
            {"cube": (3, 5, 7), "line": (9,), "odd": (5, 3), "one": (1, 1), "none": (0, 4)}.items()}  # fmt: skip
    return {name: values.astype(np.float32) for name, values in made.items()}


@pytest.mark.parametrize("convert", [lambda v: v, samples.bf16, lambda v: v.astype(np.float16)])
@pytest.mark.parametrize("start", [0, 1])
def test_a_plain_decoder_reads_the_same(convert, start):
    given = {name: convert(values + start) for name, values in tensors().items()}
    data = int4.encode(given, {}, initial=dict.fromkeys(given, start))
    expected = slow_decode(data)
    decoded = int4.decode(data)
    assert decoded.keys() == expected.keys() == given.keys()
    for name, (dtype, shape, values) in expected.items():
        assert samples.dtype_of(decoded[name]) == samples.dtype_of(given[name]) == dtype
        got = samples.values_of(decoded[name])
        assert got.shape == shape
        assert got.reshape(-1).tolist() == values


def test_values_lose_at_most_half_a_step_of_their_row():
    for name, values in tensors().items():
        decoded = int4.decode(int4.encode({name: values}, {}, initial={name: 0}))[name]
        rows = values.reshape(values.shape[0] if values.ndim > 1 and values.size else 1, -1)
        # bfloat16 keeps eight bits of a scale; half a step, and what the rounded scale moves the seventh step.
        step = np.abs(rows).max(axis=1, initial=0, keepdims=True) / 7
        error = np.abs(decoded.reshape(rows.shape) - rows)
        assert (error <= step * (0.5 + 7 / 256)).all()
        assert rows.size < 10 or error.max() > 0


def test_a_row_of_steps_comes_back_exactly():
    rows = np.array([[7, -7, 3, 0, -1], [0.5, 0.25, -3.5, 1, 0], [0, 0, 0, 0, 0]], np.float32)
    decoded = int4.decode(int4.encode({"x": rows}, {}, initial={"x": 0}))["x"]
    # Rows of scale 1 and .5: halves go to the even step.
    np.testing.assert_array_equal(decoded, [[7, -7, 3, 0, -1], [0.5, 0, -3.5, 1, 0], [0, 0, 0, 0, 0]])


def test_only_factors_of_a_lora_are_encoded_and_the_rest_stays():
    given = samples.lora(np.random.default_rng(0)) | {"base_model.model.head.weight": np.ones((3, 600), np.float32)}
    with open_any(int4.encode(given, {}, metadata={"base_model": "tiny"})) as opened:
        assert list(opened.entries) == sorted(name for name in given if "lora" in name)
        assert opened.plain == ("base_model.model.head.weight",)
        assert opened.metadata["base_model"] == "tiny"
        assert opened.metadata["format"] == "int4"
        opened.verify()
        for name, values in opened.walk():
            np.testing.assert_array_equal(values, opened.tensor(name))
            assert opened.claim(name) == ("F32", values.shape)


def test_differences_from_a_base_are_added_to_it():
    rng = np.random.default_rng(1)
    base = {"w": rng.normal(size=(4, 6)).astype(np.float32)}
    tuned = {"w": base["w"] + np.float32(0.01) * rng.normal(size=(4, 6)).astype(np.float32)}
    data = int4.encode(tuned, {}, initial={"w": base["w"]})
    decoded = int4.decode(data, initial=base.__getitem__)["w"]
    assert np.abs(decoded - tuned["w"]).max() < 0.01
    assert np.abs(decoded - base["w"]).max() > 0.01
    assert decoded.reshape(-1).tolist() == slow_decode(data, {"w": base["w"].reshape(-1).tolist()})["w"][2]
    with pytest.raises(EncodedInvalid, match="no base was given"):
        int4.decode(data)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_values_at_the_ends_of_the_range_stay_finite(dtype):
    most = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38}[dtype]
    least = {"F16": 6e-8, "BF16": 1e-40, "F32": 1e-44}[dtype]
    values = np.array([[most, -most / 2, 0], [least, -least, least]], np.float32)
    given = samples.bf16(values) if dtype == "BF16" else values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    decoded = samples.values_of(int4.decode(int4.encode({"x": given}, {}, initial={"x": 0}))["x"])
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[0, 0], samples.values_of(given)[0, 0], rtol=0.01)


def test_large_tensors_cross_pieces():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 400_001)).astype(np.float32)
    data = int4.encode({"a": values, "b": values[:1]}, {}, initial={"a": 0, "b": 0})
    with open_any(data) as opened:
        got = opened.tensor("b")
    np.testing.assert_array_equal(got, int4.decode(data)["b"])
    np.testing.assert_allclose(int4.decode(data)["a"], values, atol=np.abs(values).max() / 7)


def changed(*, rows=None, scales=None, codes=None, pieces=None, planes_sha256=None):
    """A small file with parts of it replaced and the hash made anew: a of 2 x 3 values, b of 3, an odd count."""
    values = {"a": np.array([[7, 1, 2], [3, -7, 0]], np.float32), "b": np.array([1, 2, 7], np.float32)}
    _, tensors = reference.shell(int4.encode(values, {}, initial=dict.fromkeys(values, 0)))
    text = zlib.decompress(tensors["manifest"][2])
    text = json.dumps(rows(json.loads(text)), separators=(",", ":")).encode() if rows else text
    made = tensors["scales"][2] if scales is None else scales
    plane = bytes([0x9F, 0xBA, 0x81, 0xA9, 0x0F]) if codes is None else codes
    packed = [plane] if pieces is None else pieces
    digest = hashlib.sha256(text + made + plane).hexdigest() if planes_sha256 is None else planes_sha256
    parts = {
        "manifest": ("U8", [len(zlib.compress(text))], zlib.compress(text)),
        "scales": ("BF16", [len(made) // 2], made),
        "codes": ("U8", [sum(map(len, packed))], b"".join(packed)),
        "codes_len": ("I64", [len(packed)], struct.pack(f"<{len(packed)}q", *map(len, packed))),
    }
    return forge.shell({"format": "int4", "version": "1", "planes_sha256": digest}, parts)


def test_the_file_that_is_changed_below_is_good():
    assert int4.decode(changed())["b"].tolist() == [1, 2, 7]


@pytest.mark.parametrize(
    ("rule", "data"),
    [
        ("C2.entry", changed(rows=lambda rows: [[*row, 0] for row in rows])),
        ("C2.init", changed(rows=lambda rows: [[*rows[0][:3], 2], rows[1]])),
        ("C2.sorted", changed(rows=lambda rows: rows[::-1])),
        ("C3.scales", changed(scales=struct.pack("<2H", 0x3F80, 0x3F80))),
        ("C3.negative", changed(scales=struct.pack("<3H", 0x3F80, 0xBF80, 0x3F80))),
        ("C3.finite", changed(scales=struct.pack("<3H", 0x3F80, 0x7FC0, 0x3F80))),
        ("C3.finite", changed(scales=struct.pack("<3H", 0x3F80, 0x7F00, 0x3F80))),
        ("C4.pieces", changed(pieces=[])),
        ("C4.piece", changed(pieces=[bytes(6)])),
        ("C4.padding", changed(codes=bytes([0x9F, 0xBA, 0x81, 0xA9, 0x1F]))),
        ("C5.deflate", changed(pieces=[b"\xff\xff"])),
        ("C6.code", changed(codes=bytes([0x90, 0xBA, 0x81, 0xA9, 0x0F]))),
        ("C6.code", changed(codes=bytes([0x9F, 0xBA, 0x01, 0xA9, 0x0F]))),
        ("C7.hash", changed(planes_sha256="0" * 64)),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_by_its_rule(rule, data):
    with pytest.raises(EncodedInvalid) as caught:
        int4.decode(data)
    assert caught.value.rule == rule, caught.value.detail
    if rule >= "C4.q":
        with pytest.raises(EncodedInvalid) as checked, open_any(data) as opened:
            opened.verify()
        assert checked.value.rule == rule


def test_the_bits_of_a_scale_are_bfloat16():
    values = np.full((2, 600), 0.1, np.float32)
    _, parts = reference.shell(int4.encode({"x": values}, {}, initial={"x": 0}))
    # .1 / 7 = .0142857 lies between the bfloat16 neighbours 0x3c6a and 0x3c6b, nearer to the first.
    assert struct.unpack("<2H", parts["scales"][2]) == (0x3C6A, 0x3C6A)
    assert isinstance(int4.decode(int4.encode({"x": samples.bf16(values)}, {}, initial={"x": 0}))["x"], BF16)
