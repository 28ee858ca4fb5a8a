"""Files are read tensor by tensor and written so that the same tensors give the same bytes."""

import hashlib
import os

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from moerge.errors import HeaderInvalid
from moerge.tensors import files, header
from tests.unit.tensors import raw


@pytest.fixture
def arrays():
    rng = np.random.default_rng(4)
    return {
        "b.half": rng.normal(size=(3, 5)).astype(np.float16),
        "a.single": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "c.double": rng.normal(size=7),
        "d.brain": files.BF16(files.to_bf16(rng.normal(size=(4, 2)).astype(np.float32))),
        "scalar": np.float32(2.5).reshape(()),
    }


def test_what_is_written_is_read_back_by_us_and_by_the_library(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    files.write(path, arrays, {"format": "pt", "note": "é"})
    theirs = load_file(path)
    with files.open_file(path) as file:
        assert file.names == ("a.single", "b.half", "c.double", "d.brain", "scalar")
        assert file.metadata == {"format": "pt", "note": "é"}
        for name, tensor in arrays.items():
            wanted = files.from_bf16(tensor.bits) if isinstance(tensor, files.BF16) else tensor.astype(np.float32)
            assert np.array_equal(file.float32(name), wanted)
            assert np.array_equal(theirs[name].float().numpy(), wanted)
            assert file.float32(name).dtype == np.float32
        assert file.array("c.double").dtype == np.float64
        assert file.array("d.brain").dtype == np.uint16
        assert file.raw("b.half") == arrays["b.half"].tobytes()
        assert "scalar" in file
        assert "other" not in file


def test_a_file_of_the_library_is_read(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(3, dtype=torch.float64)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    with files.open_file(tmp_path / "x.safetensors") as file:
        assert file.float32("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.float32("b").tolist() == [1, 1, 1]


def test_the_same_tensors_in_another_order_give_the_same_bytes(tmp_path, arrays):
    files.write(tmp_path / "1", arrays, {"x": "1", "y": "2"})
    files.write(tmp_path / "2", dict(reversed(arrays.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_bytes_of_a_small_file_stay_what_they_are(tmp_path):
    files.write(tmp_path / "x", {"b": np.ones(2, np.float16), "a": np.zeros(1, np.float32)}, {"format": "pt"})
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}'
    padded = text + b" " * (-len(text) % 8)
    assert (tmp_path / "x").read_bytes() == len(padded).to_bytes(8, "little") + padded + b"\0\0\0\0" + b"\x00\x3c" * 2


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    mixed = {
        "a": np.ones(1, np.uint8),
        "b": np.ones(1, np.float64),
        "c": np.ones(3, np.float16),
        "d": np.ones(1, np.float32),
    }
    files.write(tmp_path / "x", mixed)
    found = header.read(tmp_path / "x", header.COMPEFT)
    for info in found.tensors.values():
        assert (found.data_start + info.start) % header.ITEM_BYTES[info.dtype] == 0


def test_not_contiguous_and_big_endian_arrays_are_written_by_value(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    files.write(tmp_path / "x", {"t": matrix.T, "e": matrix.astype(">f4")})
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert np.array_equal(found["t"], matrix.T)
    assert np.array_equal(found["e"], matrix)


def test_a_lazy_tensor_is_made_when_it_is_written_and_must_keep_its_word(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.full((2, 2), 3, np.float32)

    files.write(tmp_path / "x", {"a": files.Lazy("F32", (2, 2), make)})
    assert made == [1]
    assert safetensors.numpy.load_file(tmp_path / "x")["a"].tolist() == [[3, 3], [3, 3]]
    with pytest.raises(ValueError, match="announced"):
        files.write(tmp_path / "y", {"a": files.Lazy("F32", (4,), make)})


def test_a_stretch_of_a_tensor_fills_an_array_of_the_callers(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    files.write(path, arrays)
    with files.open_file(path) as file:
        for name, tensor in load_file(path).items():
            wanted = tensor.float().numpy().ravel()
            for start in range(wanted.size):
                out = np.full(wanted.size - start, 9, np.float32)
                file.block_into(name, start, out)
                np.testing.assert_array_equal(out, wanted[start:])
        with pytest.raises(IndexError, match=r"c\.double has 7 values"):
            file.block_into("c.double", 5, np.empty(3, np.float32))
        os.truncate(path, path.stat().st_size - 20)
        with pytest.raises(HeaderInvalid, match="became shorter"):
            file.block_into(max(file.names, key=lambda name: file.info(name).start), 0, np.empty(1, np.float32))


def test_blocks_of_a_tensor_are_its_flat_values_whatever_their_size(tmp_path, arrays):
    files.write(tmp_path / "x", arrays)
    with files.open_file(tmp_path / "x") as file:
        for name in file.names:
            flat = file.float32(name).ravel()
            for count in (1, 2, 5, 100):
                blocks = list(files.float32_blocks(file, name, count))
                assert all(block.size == count for block in blocks[:-1])
                assert np.array_equal(np.concatenate(blocks), flat)
        assert file.block("c.double", 5, 10).size == 2
        assert file.block("c.double", 7, 10).size == 0
        assert b"".join(files.raw_blocks(file, "a.single", 16)) == file.raw("a.single")


def test_bfloat16_rounds_as_torch_does():
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 2**32, 200_000, dtype=np.uint32), np.arange(0x3F7F0000, 0x3F830000, 7, dtype=np.uint32)]
    )
    values = bits.view(np.float32)
    finite = values[np.isfinite(values)]
    wanted = torch.from_numpy(finite.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(files.to_bf16(finite), wanted)
    assert np.array_equal(files.from_bf16(wanted), torch.from_numpy(finite.copy()).to(torch.bfloat16).float().numpy())


def test_bfloat16_takes_halves_to_even_and_keeps_infinity_and_nan():
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    assert files.to_bf16(halves).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]
    special = np.array([np.inf, -np.inf, 3.4e38, 0.0, -0.0], np.float32)
    assert files.to_bf16(special).tolist() == [0x7F80, 0xFF80, 0x7F80, 0x0000, 0x8000]
    smallest_nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(files.from_bf16(files.to_bf16(smallest_nan))).all()


def test_a_tensor_that_is_read_can_be_written_to_without_changing_the_file(tmp_path):
    files.write(tmp_path / "x", {"a": np.ones(3, np.float32)})
    with files.open_file(tmp_path / "x") as file:
        file.float32("a")[:] = 9
        assert file.float32("a").tolist() == [1, 1, 1]


def test_a_file_that_becomes_shorter_while_it_is_open_is_an_error_and_not_a_crash(tmp_path):
    files.write(tmp_path / "x", {"a": np.ones(3, np.float32)})
    with files.open_file(tmp_path / "x") as file:
        with (tmp_path / "x").open("r+b") as stream:
            stream.truncate(file.header.data_start + 5)
        with pytest.raises(HeaderInvalid, match="shorter"):
            file.raw("a")


def test_a_bad_header_leaves_no_file_open(tmp_path):
    (tmp_path / "x").write_bytes(raw.dump({"a": raw.entry("F32", [2])}))
    with pytest.raises(HeaderInvalid):
        files.open_file(tmp_path / "x")


def test_an_opened_file_is_closed_once(tmp_path):
    files.write(tmp_path / "x", {"a": np.ones(3, np.float32)})
    file = files.open_file(tmp_path / "x")
    file.close()
    file.close()
    with pytest.raises(OSError):
        file.raw("a")


def test_the_library_agrees_on_a_valid_file(tmp_path, arrays):
    files.write(tmp_path / "x", arrays, {"k": "v"})
    files.check_agreement(tmp_path / "x", header.read(tmp_path / "x"))


def test_a_file_that_the_library_refuses_is_refused(tmp_path, arrays):
    files.write(tmp_path / "x", arrays)
    parsed = header.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\xff" * 100)
    with pytest.raises(HeaderInvalid) as caught:
        files.check_agreement(tmp_path / "x", parsed)
    assert caught.value.rule == "T3"


def test_a_header_read_differently_is_refused_and_the_tensor_named(tmp_path, arrays):
    files.write(tmp_path / "x", arrays, {"k": "v"})
    parsed = header.read(tmp_path / "x")
    other = parsed.tensors | {"b.half": header.TensorInfo("b.half", "BF16", (3, 5), 0, 30)}
    with pytest.raises(HeaderInvalid) as caught:
        files.check_agreement(tmp_path / "x", header.Header(parsed.metadata, other, 0, 0))
    assert (caught.value.pointer, caught.value.rule) == ("b.half", "T3")
    with pytest.raises(HeaderInvalid) as caught:
        files.check_agreement(tmp_path / "x", header.Header({"k": "w"}, parsed.tensors, 0, 0))
    assert caught.value.pointer == "__metadata__"


def test_the_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
