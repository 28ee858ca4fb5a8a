"""What a file says is what is decoded: against the plain reference decoder, whole and tensor by tensor."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from moerge.compression.codecs import compeft
from moerge.compression.reader import open_encoded
from moerge.errors import EncodedInvalid
from moerge.tensors.files import BF16
from tests.unit.compression import forge, reference, samples
from tests.unit.compression.forge import PIECE, Forge


def assert_equals_reference(data, base=None):
    expected = reference.decode(data, {name: values.reshape(-1).tolist() for name, values in (base or {}).items()})
    with open_encoded(data) as encoded:
        decoded = dict(encoded.walk(lambda name: base[name]))
    assert decoded.keys() == expected.keys()
    for name, (dtype, shape, values) in expected.items():
        assert samples.dtype_of(decoded[name]) == dtype
        got = samples.values_of(decoded[name])
        assert got.shape == shape
        assert got.reshape(-1).tolist() == values
    return decoded


def test_the_sample_decodes_as_worked_by_hand():
    decoded = compeft.decode(samples.sample_file())
    assert list(decoded) == ["a", "b", "c", "d", "head"]
    a = np.zeros(800, np.float32)
    a[[0, 3, 4, 300, 799]] = [-0.5, 0.5, -0.5, 0.5, 0.5]
    np.testing.assert_array_equal(decoded["a"], a.reshape(4, 200))
    # 0.3 is 0x3e99999a in float32 and rounds up to 0x3e9a.
    assert isinstance(decoded["b"], BF16)
    assert decoded["b"].bits.shape == (3, 7)
    assert decoded["b"].bits.reshape(-1)[[0, 1, 2, 3, 20]].tolist() == [0xBE9A, 0x3E9A, 0xBE9A, 0, 0xBE9A]
    assert decoded["c"].tolist() == [0] * 5
    assert decoded["d"].dtype == np.float16
    assert decoded["d"].reshape(-1).tolist() == [1, 1.25] + [1] * 9 + [0.75]
    assert decoded["head"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_sample_decodes_as_by_the_reference():
    assert_equals_reference(samples.sample_file())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("init", [0, 1])
def test_decoding_equals_the_reference(dtype, density, init):
    rng = np.random.default_rng(int(density * 1000))
    entries = []
    for name, shape in (("x", (37, 11)), ("y", (1,)), ("z", (5, 2, 301))):
        kept = np.flatnonzero(rng.random(np.prod(shape)) < density)
        scale = 0.0123 if kept.size else 0.0
        entries.append(samples.entry(name, dtype, shape, kept, rng.random(kept.size) < 0.5, scale, init))
    assert_equals_reference(samples.written(entries))


def test_entries_that_cross_pieces_decode_whole_and_alone():
    rng = np.random.default_rng(5)
    entries = []
    for name, size, density in (("a", 900_000, 0.25), ("b", 2_300_000, 0.5), ("c", 300_000, 0.2)):
        kept = np.flatnonzero(rng.random(size) < density)
        entries.append(samples.entry(name, "BF16", (size,), kept, rng.random(kept.size) < 0.5, 0.7))
    data = samples.written(entries)
    assert len(Forge.of(data).plane) > 2 * PIECE
    decoded = compeft.decode(data)
    with open_encoded(data) as encoded:
        for entry in reversed(entries):
            expected = np.zeros(entry.size, np.uint16)
            expected[entry.positions] = np.where(entry.negative, 0xBF33, 0x3F33)
            np.testing.assert_array_equal(decoded[entry.name].bits, expected)
            np.testing.assert_array_equal(encoded.tensor(entry.name).bits, expected)


def test_one_tensor_is_read_without_the_pieces_of_others():
    kept = np.arange(0, 400_000, 4)
    entries = [samples.entry(name, "F32", (400_000,), kept, np.zeros(kept.size, bool), 1.0) for name in "abcd"]
    made = Forge.of(samples.written(entries))
    pieces = [forge.squeeze(made.plane[at : at + PIECE]) for at in range(0, len(made.plane), PIECE)]
    assert len(pieces) >= 2
    pieces[-1] = b"\xff" * len(pieces[-1])
    with open_encoded(made.build(pieces=pieces)) as encoded:
        assert encoded.tensor("a")[:5].tolist() == [1, 0, 0, 0, 1]
        with pytest.raises(EncodedInvalid, match="C5"):
            encoded.tensor("d")


def test_differences_are_added_to_the_base():
    rng = np.random.default_rng(2)
    base = {
        "x": rng.normal(size=(9, 5)).astype(np.float32),
        "y": rng.normal(size=(40,)).astype(np.float16),
    }
    entries = [
        samples.entry("x", "F32", (9, 5), [0, 7, 44], [True, False, True], 0.1, "base"),
        samples.entry("y", "F16", (40,), list(range(0, 40, 2)), [i % 3 == 0 for i in range(20)], 0.03, "base"),
    ]
    decoded = assert_equals_reference(samples.written(entries), base)
    assert decoded["x"][0, 0] == np.float32(base["x"][0, 0]) - np.float32(0.1)
    assert decoded["x"][0, 1] == base["x"][0, 1]


def test_a_difference_without_its_base_says_so():
    data = samples.written([samples.entry("x", "F32", (3,), [0], [False], 1.0, "base")])
    with pytest.raises(EncodedInvalid, match="no base was given"):
        compeft.decode(data)
    with pytest.raises(EncodedInvalid, match="another shape"):
        compeft.decode(data, initial=lambda name: np.zeros((1, 3), np.float32))


def test_any_safetensors_reader_opens_the_planes():
    tensors = load_safetensors(samples.sample_file())
    assert tensors["scales"].tolist() == [0.5, pytest.approx(0.3), 0.0, 0.25]
    assert tensors["pos"].tolist() == [0, 2, 0, 255, 40, 255, 243, 0x27, 0x0B, 0x11, 1, 9]
    assert tensors["pos_len"].tolist() == [12]
    assert tensors["sign"].tolist() == [0b00101, 0b01010101, 0b1, 0b10]
    assert tensors["plain/head"].shape == (2, 3)
    metadata, _ = reference.shell(samples.sample_file())
    assert metadata["format"] == "compeft"
    assert metadata["version"] == "1"
    assert metadata["n_params"] == "838"
    assert metadata["n_nonzero"] == "16"
    assert metadata["base_model"] == "tiny"


def test_the_manifest_lists_what_the_format_says():
    rows, *_ = reference.planes(samples.sample_file())
    assert rows == [
        ["a", "F32", [4, 200], 5, 7, 0, 0],
        ["b", "BF16", [3, 7], 9, 3, 1, 0],
        ["c", "F16", [5], 0, 0, 0, 0],
        ["d", "F16", [2, 3, 2], 2, 2, 0, 1],
    ]


def test_names_must_ascend_when_written():
    with pytest.raises(ValueError, match="ascend"):
        samples.written([samples.entry("b", "F32", (1,), [], [], 0.0), samples.entry("a", "F32", (1,), [], [], 0.0)])


def test_a_file_of_plain_tensors_alone_is_a_file():
    data = samples.written([], plain={"x": samples.bf16(np.ones(3, np.float32))})
    decoded = compeft.decode(data)
    assert decoded["x"].bits.tolist() == [0x3F80] * 3


def test_facts_of_an_open_file(tmp_path):
    path = tmp_path / "x.compeft"
    path.write_bytes(samples.sample_file())
    with open_encoded(path) as encoded:
        assert encoded.plain == ("head",)
        assert encoded.claim("a") == ("F32", (4, 200))
        assert encoded.claim("head") == ("F32", (2, 3))
        assert encoded.file_bytes == path.stat().st_size
        sizes = [len(tensor[2]) for name, tensor in reference.shell(path.read_bytes())[1].items() if "/" not in name]
        assert encoded.encoded_bytes == sum(sizes)
        assert encoded.tensor("head").tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(KeyError):
            encoded.tensor("nothing")
        with pytest.raises(KeyError):
            encoded.tensor("pos")


def test_a_file_that_became_shorter_is_refused(tmp_path):
    path = tmp_path / "x.compeft"
    data = samples.sample_file()
    path.write_bytes(data)
    with open_encoded(path) as encoded:
        with path.open("r+b") as stream:
            stream.truncate(len(data) - 40)
        with pytest.raises(EncodedInvalid) as caught:
            encoded.verify()
    assert caught.value.rule == "C1.size"


def test_the_header_length_is_read_before_anything_else(tmp_path):
    path = tmp_path / "x.compeft"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(EncodedInvalid) as caught:
        open_encoded(path)
    assert caught.value.rule == "C1.header"
