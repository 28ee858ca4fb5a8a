"""Shards with an index are one checkpoint, and what an index may name is beside it."""

import json

import numpy as np
import pytest

from moerge.errors import CheckpointInvalid, HeaderInvalid
from moerge.tensors import files
from moerge.tensors.checkpoints import open_checkpoint
from moerge.tensors.files import BF16

VALUES = {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.arange(4, dtype=np.int64)}


def sharded(folder, shards, places=None):
    """Shards by file name, and an index that names them."""
    folder.mkdir()
    for name, tensors in shards.items():
        files.write(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors} if places is None else places
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_folder_an_index_and_a_file_are_opened(tmp_path):
    folder = sharded(tmp_path / "s", {"1.safetensors": {"a.weight": VALUES["a.weight"]}, "2.safetensors": {
        "b.weight": VALUES["b.weight"]}})  # fmt: skip
    files.write(tmp_path / "one.safetensors", VALUES)
    for path in (folder, folder / "model.safetensors.index.json", tmp_path / "one.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.names == ("a.weight", "b.weight")
            assert "a.weight" in checkpoint
            assert "c" not in checkpoint
            assert checkpoint.info("b.weight").dtype == "I64"
            np.testing.assert_array_equal(checkpoint.float32("a.weight"), VALUES["a.weight"])
            np.testing.assert_array_equal(checkpoint.tensor("b.weight"), VALUES["b.weight"])
    (tmp_path / "plain").mkdir()
    files.write(tmp_path / "plain" / "model.safetensors", {"x": BF16(np.array([0x3F80], np.uint16))})
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        assert checkpoint.tensor("x").bits.tolist() == [0x3F80]
        assert checkpoint.file_bytes == (tmp_path / "plain" / "model.safetensors").stat().st_size


def test_names_with_a_prefix_mean_the_tensor_of_the_base(tmp_path):
    inner = {"layer.0.query.weight": np.ones((4, 4), np.float32), "query.weight": np.ones((2, 2), np.float32)}
    files.write(tmp_path / "base.safetensors", inner)
    with open_checkpoint(tmp_path / "base.safetensors") as base:
        assert base.same_as("bert.layer.0.query.weight", (4, 4)) == "layer.0.query.weight"
        assert base.same_as("layer.0.query.weight", (4, 4)) == "layer.0.query.weight"
        # The longest end that fits in name and shape.
        assert base.same_as("layer.0.query.weight", (2, 2)) == "query.weight"
        assert base.same_as("layer.0.query.weight", (3, 3)) is None
        assert base.same_as("layer.0.query.bias", (4, 4)) is None


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/x.safetensors", "", ".", "gone.safetensors", "a\\b"])
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    files.write(tmp_path / "out.safetensors", VALUES)
    folder = sharded(tmp_path / "s", {"1.safetensors": VALUES}, {"a.weight": "1.safetensors", "b.weight": name})
    (folder / "sub").mkdir()
    files.write(folder / "sub" / "x.safetensors", VALUES)
    files.write(folder / "a\\b", VALUES)
    with pytest.raises(CheckpointInvalid, match="names a file"):
        open_checkpoint(folder)


def test_a_tensor_lies_in_one_shard_only(tmp_path):
    folder = sharded(tmp_path / "s", {"1.safetensors": VALUES, "2.safetensors": {"a.weight": VALUES["a.weight"]}},
                     {"a.weight": "2.safetensors", "b.weight": "1.safetensors"})  # fmt: skip
    with pytest.raises(CheckpointInvalid, match="two shards") as caught:
        open_checkpoint(folder)
    assert caught.value.met == "a.weight"


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": {"a": 7}}', '{"weight_map": []}', '{"a": NaN}'])
def test_a_bad_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointInvalid) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.remedy


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointInvalid, match="no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(HeaderInvalid):
        open_checkpoint(tmp_path)


def test_a_streamed_tensor_must_be_as_long_as_announced(tmp_path):
    for blocks in ([b"12345678"], [b"1234", b"5678"]):
        files.write(tmp_path / "x", {"t": files.Streamed("F32", (2,), lambda blocks=blocks: iter(blocks))})
        with files.open_file(tmp_path / "x") as file:
            assert file.raw("t") == b"12345678"
    with pytest.raises(ValueError, match="announced with 8 bytes and came with 4"):
        files.write(tmp_path / "y", {"t": files.Streamed("F32", (2,), lambda: iter([b"1234"]))})
