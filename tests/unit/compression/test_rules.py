"""Each numbered rule of compeft/1 has a file that only this rule refuses."""

import json
import math
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from moerge.compression import manifest
from moerge.compression.codecs import compeft
from moerge.compression.manifest import Budget
from moerge.compression.reader import open_encoded
from moerge.compression.rules import RULES
from moerge.errors import EncodedInvalid
from tests.unit.compression import forge, samples
from tests.unit.compression.forge import PIECE, Forge


def sample():
    return Forge.of(samples.sample_file())


def row(number, field, value):
    """The sample with one field of one row changed."""
    made = sample()
    made.rows[number][field] = value
    return made.build()


def scale(number, value):
    made = sample()
    made.scales[number] = value
    return made.build()


def text(value):
    return sample().build(text=value)


def metadata(**changes):
    made = sample()
    made.metadata |= changes
    return made.build()


def tensors(**changes):
    return sample().build(tensors=changes)


def renamed(old, new):
    made = sample()
    for entry in made.rows:
        entry[0] = new if entry[0] == old else entry[0]
    return made.build()


def plane(new):
    """The sample with other bytes in its position plane: 7 of gaps for a, 3 of mask for b, 2 of gaps for d."""
    made = sample()
    assert len(new) == len(made.plane) == 12
    made.plane = new
    return made.build()


def large(pieces):
    """A file of one entry whose plane of zeros spans two pieces, with pieces of the test's making."""
    size = PIECE + 1000
    entry = samples.entry("x", "F32", (4 * size,), np.arange(size), np.zeros(size, bool), 1.0)
    made = Forge.of(samples.written([entry]))
    good = [forge.squeeze(made.plane[:PIECE]), forge.squeeze(made.plane[PIECE:])]
    return made.build(pieces=pieces(good, made.plane))


def deflate(data, end=True):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush(zlib.Z_FINISH if end else zlib.Z_SYNC_FLUSH)


def sign_padding():
    made = sample()
    made.signs = bytes([made.signs[0] | 0b00100000]) + made.signs[1:]
    return made.build()


def swapped_planes():
    """Two entries of equal counts whose gaps are exchanged, but for the hash."""
    first = samples.entry("x", "F32", (50,), [1, 2, 3], [False] * 3, 1.0)
    second = samples.entry("y", "F32", (50,), [5, 6, 40], [False] * 3, 1.0)
    data = samples.written([first, second])
    made = Forge.of(data)
    made.plane = made.plane[3:] + made.plane[:3]
    return made.build(sha256=made.metadata["planes_sha256"])


def padded_with_escapes():
    """1,019 values have room for three escapes; a fourth in the plane is refused by its length alone."""
    made = Forge.of(samples.written([samples.entry("x", "F32", (1019,), [0], [False], 1.0)]))
    made.plane += b"\xff" * 4
    made.rows[0][4] += 4
    return made.build()


SAMPLE = sample()
A, B, D = SAMPLE.plane[:7], SAMPLE.plane[7:10], SAMPLE.plane[10:]
MANY = [[f"{number:06}", "F32", [], 0, 0, 0, 0] for number in range(manifest.ENTRIES + 1)]
# The rows of the sample: a gap8 F32 [4, 200] nnz 5; b mask BF16 [3, 7] nnz 9; c F16 [5] nnz 0; d gap8 F16 [2,3,2] nnz 2.
HOSTILE = [
    ("C1.size", samples.sample_file(), {"budget": Budget(file_bytes=100)}),
    ("C1.header", b"", {}),
    ("C1.header", samples.sample_file()[:-1], {}),
    ("C1.header", samples.sample_file() + b"\0", {}),
    ("C1.header", sample().build(length=2**24 + 1), {}),
    ("C1.header", sample().build(length=2**62), {}),
    ("C1.header", sample().build(gap=8), {}),
    ("C1.header", b"PK\x03\x04" + bytes(100), {}),
    ("C1.format", metadata(format="gguf"), {}),
    ("C1.format", metadata(format=None), {}),
    ("C1.version", metadata(version="2"), {}),
    ("C1.version", metadata(version="1.0"), {}),
    ("C1.version", metadata(version=None), {}),
    ("C1.names", tensors(extra=("U8", [1], b"x")), {}),
    ("C1.names", tensors(sign=None), {}),
    ("C1.names", tensors(**{"plain/__metadata__": ("F32", [1], bytes(4))}), {}),
    ("C1.types", tensors(pos_len=("U8", [8], struct.pack("<q", 14))), {}),
    ("C1.types", tensors(scales=("F32", [2, 2], struct.pack("<4f", *SAMPLE.scales))), {}),
    ("C2.inflate", sample().build(manifest=b"no zlib"), {}),
    ("C2.inflate", sample().build(manifest=zlib.compress(json.dumps(SAMPLE.rows).encode())[:-3]), {}),
    ("C2.inflate", sample().build(manifest=zlib.compress(json.dumps(SAMPLE.rows).encode()) + b"x"), {}),
    ("C2.size", text(b" " * manifest.INFLATED_BYTES + b"[]"), {}),
    ("C2.json", text(b"[[[[]]]]"), {}),
    ("C2.json", text(b"[" * 100_000), {}),
    ("C2.json", text(b'[{"a":1}]'), {}),
    ("C2.json", text(b"[NaN]"), {}),
    ("C2.json", text(b"\xff"), {}),
    ("C2.json", text(b"[" + b"9" * 5000 + b"]"), {}),
    ("C2.count", text(json.dumps(MANY).encode()), {}),
    ("C2.entry", text(b"7"), {}),
    ("C2.entry", text(b"[7]"), {}),
    ("C2.entry", text(b'[["a","F32",[1],0,0,0]]'), {}),
    ("C2.entry", row(0, 0, 7), {}),
    ("C2.entry", row(0, 3, 5.0), {}),
    ("C2.entry", row(0, 3, True), {}),
    ("C2.entry", row(0, 3, -1), {}),
    ("C2.entry", row(0, 4, "6"), {}),
    ("C2.name", renamed("a", ""), {}),
    ("C2.name", renamed("d", "é" * 257), {}),
    ("C2.name", renamed("d", "d\x1b[31m"), {}),
    ("C2.name", renamed("a", "__metadata__"), {}),
    ("C2.unique", renamed("b", "a"), {}),
    ("C2.unique", renamed("d", "head"), {}),
    ("C2.sorted", renamed("c", "aa"), {}),
    ("C2.dtype", row(0, 1, "I8"), {}),
    ("C2.dtype", row(0, 1, ["F32"]), {}),
    ("C2.shape", row(0, 2, [1] * 9), {}),
    ("C2.shape", row(0, 2, [800.0]), {}),
    ("C2.shape", row(0, 2, [True, 800]), {}),
    ("C2.shape", row(0, 2, [-4, -200]), {}),
    ("C2.shape", row(0, 2, 800), {}),
    ("C2.coding", row(0, 5, 2), {}),
    ("C2.coding", row(0, 5, False), {}),
    ("C2.init", row(0, 6, 2), {}),
    ("C2.init", row(0, 6, "one"), {}),
    ("C2.init", row(0, 6, True), {}),
    ("C2.values", row(2, 2, [2**31, 3]), {}),
    ("C2.values", row(2, 2, [0, 2**40, 2**40]), {}),
    ("C2.values", row(2, 2, [10**300]), {}),
    ("C2.values", samples.sample_file(), {"budget": Budget(values=837)}),
    ("C2.budget", samples.sample_file(), {"budget": Budget(output_bytes=3275)}),
    ("C2.budget", row(2, 2, [2**31]), {"budget": Budget(output_bytes=2**31)}),
    ("C2.expected", samples.sample_file(), {"expected": {"a": (200, 4), "b": (3, 7), "c": (5,), "d": (2, 3, 2)}}),
    ("C2.expected", samples.sample_file(), {"expected": {"a": (4, 200), "b": (3, 7), "d": (2, 3, 2)}}),
    ("C3.scales", sample().build(scales=struct.pack("<3f", *SAMPLE.scales[:3])), {}),
    ("C3.scales", sample().build(scales=struct.pack("<5f", *SAMPLE.scales, 1)), {}),
    ("C3.count", row(3, 3, 13), {}),
    ("C3.plane", row(0, 4, 4), {}),
    ("C3.plane", row(0, 4, 9), {}),
    ("C3.plane", padded_with_escapes(), {}),
    ("C3.plane", row(1, 4, 2), {}),
    ("C3.plane", row(1, 4, 4), {}),
    ("C3.finite", scale(0, math.nan), {}),
    ("C3.finite", scale(0, math.inf), {}),
    ("C3.finite", scale(2, math.inf), {}),
    ("C3.finite", scale(3, 65520.0), {}),
    ("C3.finite", scale(1, 3.4028234e38), {}),
    ("C3.negative", scale(0, -0.5), {}),
    ("C3.negative", scale(2, -1.0), {}),
    ("C3.zero", scale(0, 0.0), {}),
    ("C3.zero", scale(3, 2.9e-8), {}),
    ("C4.pieces", sample().build(lengths=[]), {}),
    ("C4.pieces", sample().build(lengths=[6, 6]), {}),
    ("C4.piece", sample().build(lengths=[0]), {}),
    ("C4.piece", sample().build(lengths=[-1]), {}),
    ("C4.piece", sample().build(lengths=[2**62]), {}),
    ("C4.piece", sample().build(pieces=[SAMPLE.plane + b"\0"]), {}),
    ("C4.pos", sample().build(lengths=[len(SAMPLE.plane) - 1]), {}),
    ("C4.sign", tensors(sign=("U8", [3], SAMPLE.signs[:3])), {}),
    ("C4.sign", tensors(sign=("U8", [5], SAMPLE.signs + b"\0")), {}),
    ("C4.padding", sign_padding(), {}),
    ("C4.padding", plane(A + bytes([0x27, 0x0B, 0x91]) + D), {}),
    ("C5.deflate", large(lambda good, _: [b"\xff" * len(good[0]), good[1]]), {}),
    ("C5.length", large(lambda good, whole: [deflate(whole[:PIECE] + bytes(1)), good[1]]), {}),
    ("C5.length", large(lambda good, whole: [deflate(whole[: PIECE - 1]), good[1]]), {}),
    ("C5.length", large(lambda good, _: [deflate(bytes(2**26)), good[1]]), {}),
    ("C5.end", large(lambda good, whole: [deflate(whole[:PIECE], end=False), good[1]]), {}),
    ("C5.trailing", large(lambda good, _: [good[0] + b"\0", good[1]]), {}),
    ("C6.position", plane(A[:6] + b"\xf4" + B + D), {}),
    ("C6.position", plane(A + B + b"\x01\x0a"), {}),
    ("C6.emitted", plane(bytes([0, 2, 0, 0, 40, 255, 243]) + B + D), {}),
    ("C6.emitted", plane(bytes([0, 2, 0, 255, 255, 255, 5]) + B + D), {}),
    ("C6.escape", plane(bytes([0, 2, 0, 40, 5, 255, 255]) + B + D), {}),
    ("C6.popcount", row(1, 3, 10), {}),
    ("C6.popcount", plane(A + bytes([0x2F, 0x0B, 0x11]) + D), {}),
    ("C6.popcount", plane(A + bytes([0x26, 0x0B, 0x11]) + D), {}),
    ("C7.hash", sample().build(sha256="0" * 64), {}),
    ("C7.hash", sample().build(sha256=SAMPLE.metadata["planes_sha256"].upper()), {}),
    ("C7.hash", sample().build(sha256=""), {}),
    ("C7.hash", swapped_planes(), {}),
]


def refused(data, options):
    with pytest.raises(EncodedInvalid) as caught, open_encoded(data, **options) as encoded:
        for _ in encoded.walk():
            pass
    return caught.value


def test_the_files_that_are_changed_below_are_good():
    with open_encoded(samples.sample_file()) as encoded:
        assert [name for name, _ in encoded.walk()] == ["a", "b", "c", "d"]
    assert sample().build() != b""
    compeft.decode(sample().build())
    compeft.decode(large(lambda good, _: good))
    compeft.decode(large(lambda good, whole: [whole[:PIECE], good[1]]))


@pytest.mark.parametrize(
    ("rule", "data", "options"), HOSTILE, ids=[f"{rule}-{number}" for number, (rule, _, _) in enumerate(HOSTILE)]
)
def test_a_hostile_file_is_refused_by_its_rule(rule, data, options):
    error = refused(data, options)
    assert error.rule == rule, error.detail
    assert error.pointer
    assert error.wanted not in (None, "")
    assert error.remedy


def test_every_rule_has_a_hostile_file():
    # C6.code is of the container int4 alone; test_int4 has its files.
    assert {rule for rule, _, _ in HOSTILE} == set(RULES) - {"C6.code"}


@pytest.mark.parametrize(
    ("rule", "data"), [(rule, data) for rule, data, options in HOSTILE if not options and rule[1] in "567"]
)
def test_checking_alone_finds_what_decoding_finds(rule, data):
    with open_encoded(data) as encoded, pytest.raises(EncodedInvalid) as caught:
        encoded.verify()
    assert caught.value.rule == rule


def test_claims_and_bombs_are_refused_in_little_memory():
    bomb = large(lambda good, _: [deflate(bytes(2**26)), good[1]])
    claim = row(2, 2, [2**31, 3])
    manifest_bomb = sample().build(manifest=zlib.compress(bytes(2**26)), text=b"")
    for data in (bomb, claim, manifest_bomb):
        tracemalloc.start()
        refused(data, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**25


def test_errors_name_the_entry_and_are_plain_text():
    error = refused(plane(A[:6] + b"\xf4" + B + D), {})
    assert error.pointer == "a"
    assert error.met == "position 800"
    assert error.wanted == "below 800"
    assert "C6.position" in str(error)


def test_every_rule_and_every_setting_stands_in_the_documentation():
    text = (Path(__file__).parents[3] / "docs" / "compeft.md").read_text(encoding="utf-8")
    for rule, holds in RULES.items():
        assert f"| `{rule}` | {holds} |" in text
    for parameter in compeft.SPEC.parameters:
        assert all(f"`{choice}`" in text for choice in parameter.choices)
