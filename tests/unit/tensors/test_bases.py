"""Weights of a base are found under the names adapters use, and only where it is clear which is meant."""

import hashlib

import numpy as np
import pytest

from moerge.errors import CheckpointInvalid
from moerge.tensors import bases, files
from moerge.tensors.bases import BaseWeights


@pytest.fixture
def base(tmp_path):
    """Open a base that holds tensors of these names, each filled with its position."""

    def made(*names):
        files.write(tmp_path / "model.safetensors",
                    {name: np.full((2, 3), place, np.float32) for place, name in enumerate(names)})  # fmt: skip
        return BaseWeights(tmp_path)

    return made


@pytest.mark.parametrize(
    ("name", "held", "found"),
    [
        ("layer.0.query.weight", ["layer.0.query.weight", "bert.layer.0.query.weight"], "layer.0.query.weight"),
        ("layer.0.query.weight", ["bert.layer.0.query.weight", "bert.layer.1.query.weight"], "bert.layer.0.query.weight"),
        ("model.layers.0.q.weight", ["base.model.layers.0.q.weight"], "base.model.layers.0.q.weight"),
        ("base_model.model.bert.layer.0.query.weight", ["layer.0.query.weight"], "layer.0.query.weight"),
        ("transformer.h.0.c_attn.weight", ["h.0.c_attn.weight", "h.1.c_attn.weight"], "h.0.c_attn.weight"),
        ("block.0.q.weight", ["encoder.block.0.q.weight", "decoder.block.0.q.weight"], None),
        ("bert.block.0.q.weight", ["block.0.q.weight", "model.bert.block.0.q.weight"], None),
        ("layer.0.query.weight", ["layer.1.query.weight"], None),
        ("other.layer.1.layer.0.query.weight", ["layer.0.query.weight"], None),
        ("lm_head.weight", ["weight", "head.weight"], None),
        ("query.weight", ["layer.0.query.weight"], None),
        ("layer.0.query.weight", [], None),
    ],
)  # fmt: skip
def test_a_name_means_the_same_tensor_or_the_only_one_that_a_wrapper_names_longer(base, name, held, found):
    with base("stranger", *held) as opened:
        assert opened.find(name) == found
        assert opened.shape(name) == (None if found is None else (2, 3))
        value = opened.tensor(name)
        assert (value is None) == (found is None)
        if found is not None:
            assert (value == 1 + held.index(found)).all()
            assert (opened.weight(name.removesuffix(".weight")) == value).all()


def test_the_digest_is_that_of_names_and_hashes_of_the_files(base, tmp_path):
    with base("a.weight") as opened:
        line = f"model.safetensors {hashlib.sha256((tmp_path / 'model.safetensors').read_bytes()).hexdigest()}\n"
        assert opened.digest == bases.digest(tmp_path) == hashlib.sha256(line.encode()).hexdigest()
    with BaseWeights(tmp_path, "known") as opened:
        assert opened.digest == "known"


def test_shards_have_one_digest_whatever_order_the_index_names_them_in(tmp_path):
    for name in ("b", "a"):
        files.write(tmp_path / f"{name}.safetensors", {f"{name}.weight": np.ones((1, 1), np.float32)})
    sums = {name: hashlib.sha256((tmp_path / f"{name}.safetensors").read_bytes()).hexdigest() for name in "ab"}
    text = "".join(f"{name}.safetensors {sums[name]}\n" for name in "ab")
    index = '{"weight_map": {"b.weight": "b.safetensors", "a.weight": "a.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert bases.digest(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


def test_integers_are_not_taken_for_the_weights_of_a_base(tmp_path):
    files.write(tmp_path / "model.safetensors", {"q.weight": np.ones((2, 2), np.int8)})
    with BaseWeights(tmp_path) as opened, pytest.raises(CheckpointInvalid) as caught:
        opened.weight("q")
    assert (caught.value.pointer, caught.value.met) == ("q.weight", "I8")
    assert "quantised" in caught.value.remedy


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointInvalid):
        BaseWeights(tmp_path)
