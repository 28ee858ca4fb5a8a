"""IA3, saved modules and full fine-tunes: compressed by request, brought back, loaded by stock PEFT and transformers."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from moerge.compression import compress, decompress, open_any
from moerge.compression.codecs import compeft
from moerge.errors import AdapterInvalid, BaseMismatch, CheckpointInvalid, ParameterInvalid
from tests.unit.compression import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
SIZES = {
    "vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip


def disturb(model, share=0.02, seed=1):
    """Every parameter moved a little, as by training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(share * torch.randn(parameter.shape, generator=generator))
    return model


def base_model(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES))


@pytest.fixture
def folders(tmp_path):
    """A base checkpoint, and a classifier fine-tuned from it, both as transformers saves them."""
    base_model().save_pretrained(tmp_path / "base")
    tuned = BertForSequenceClassification(BertConfig(**SIZES))
    tuned.bert.load_state_dict(base_model().state_dict())
    disturb(tuned).save_pretrained(tmp_path / "tuned")
    return tmp_path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_full_fine_tune_comes_back_from_its_base(folders):
    heard = []
    report = compress(folders / "tuned", folders / "x", base=folders / "base", density=0.2, progress=heard.append)
    tuned, base = load_file(folders / "tuned/model.safetensors"), load_file(folders / "base/model.safetensors")
    matrices = {name for name, tensor in tuned.items() if tensor.ndim > 1 and tensor.numel() >= 1024}
    matrices = {name for name in matrices if name.removeprefix("bert.") in base}
    assert len(matrices) >= 8
    assert {tensor.name for tensor in report.tensors} == matrices
    assert report.size == sum(tuned[name].numel() for name in matrices)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    decompress(folders / "x", folders / "out", base=folders / "base")
    got = load_file(folders / "out/model.safetensors")
    assert got.keys() == tuned.keys()
    for name in tuned:
        if name not in matrices:
            assert torch.equal(got[name], tuned[name]), name
            continue
        start = base[name.removeprefix("bert.")].numpy()
        difference = tuned[name].numpy() - start
        change = got[name].numpy() - start
        kept = np.abs(change) > 1e-6
        assert kept.sum() == max(1, round(0.2 * kept.size))
        assert np.abs(difference[kept]).min() >= np.abs(difference[~kept]).max()
        assert (np.sign(change[kept]) == np.sign(difference[kept])).all()
        # The scale of a difference is unbiased along it.
        scale = np.sum(difference**2.0) / np.abs(difference[kept]).sum()
        np.testing.assert_allclose(np.abs(change[kept]), scale, rtol=1e-3)
    assert (folders / "out/config.json").read_bytes() == (folders / "tuned/config.json").read_bytes()
    loaded = BertForSequenceClassification.from_pretrained(folders / "out")
    assert torch.equal(loaded.classifier.weight, tuned["classifier.weight"])


def test_the_file_names_its_base_and_another_one_is_refused(folders):
    compress(folders / "tuned", folders / "x", base=folders / "base")
    with open_any(folders / "x") as opened:
        assert opened.metadata["base_sha256"] == sha256(folders / "base/model.safetensors")
        assert opened.metadata["source_sha256"] == sha256(folders / "tuned/model.safetensors")
        assert {entry.init for entry in opened.entries.values()} == {"base"}
    with pytest.raises(BaseMismatch, match="no base was given"):
        decompress(folders / "x", folders / "out")
    base_model(seed=7).save_pretrained(folders / "other")
    with pytest.raises(BaseMismatch) as caught:
        decompress(folders / "x", folders / "out", base=folders / "other")
    assert sha256(folders / "other/model.safetensors") in str(caught.value.met)
    assert sha256(folders / "base/model.safetensors") in str(caught.value.wanted)
    assert not (folders / "out").exists()


def test_shards_are_one_checkpoint(folders):
    base_model().save_pretrained(folders / "shards", max_shard_size="20KB")
    assert len(list((folders / "shards").glob("*.safetensors"))) > 2
    one = compress(folders / "tuned", folders / "x", base=folders / "base")
    two = compress(folders / "tuned", folders / "y", base=folders / "shards")
    assert one.planes_sha256 == two.planes_sha256
    decompress(folders / "x", folders / "out1", base=folders / "base")
    decompress(folders / "y", folders / "out2", base=folders / "shards")
    assert (folders / "out1/model.safetensors").read_bytes() == (folders / "out2/model.safetensors").read_bytes()
    shards = sorted((folders / "shards").glob("*.safetensors"))
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in shards)
    with open_any(folders / "y") as opened:
        assert opened.metadata["base_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    shards[0].unlink()
    with pytest.raises(CheckpointInvalid):
        compress(folders / "tuned", folders / "z", base=folders / "shards")


@pytest.mark.parametrize("preset", ["paper", "hq", "int4"])
def test_other_presets_take_a_full_fine_tune_too(folders, preset):
    report = compress(folders / "tuned", folders / "x", base=folders / "base", preset=preset)
    assert report.preset == preset
    decompress(folders / "x", folders / "out", base=folders / "base")
    got, tuned = load_file(folders / "out/model.safetensors"), load_file(folders / "tuned/model.safetensors")
    base = load_file(folders / "base/model.safetensors")
    # The release takes every tensor of the base, biases and norms included.
    assert (len(report.tensors) == len(base)) == (preset == "paper")
    change = {name: got[f"bert.{name}"] - base[name] for name in base}
    wanted = {name: tuned[f"bert.{name}"] - base[name] for name in base}
    cosine = sum((change[name] * wanted[name]).sum() for name in base)
    assert cosine / sum(t.square().sum() for t in wanted.values()) > 0.1
    assert torch.equal(got["classifier.weight"], tuned["classifier.weight"])
    if preset == "int4":
        assert all(torch.allclose(got[name], tuned[name], atol=0.01) for name in tuned)


def test_a_checkpoint_needs_its_base(folders):
    with pytest.raises(BaseMismatch, match="full checkpoint"):
        compress(folders / "tuned", folders / "x")
    assert not (folders / "x").exists()
    torch.manual_seed(0)
    BertModel(BertConfig(**(SIZES | {"hidden_size": 96}))).save_pretrained(folders / "wide")
    with pytest.raises(BaseMismatch, match="No matrix"):
        compress(folders / "tuned", folders / "x", base=folders / "wide")
    (folders / "empty").mkdir()
    with pytest.raises(CheckpointInvalid):
        compress(folders / "empty", folders / "x", base=folders / "base")


def adapter(folder, config):
    model = disturb(get_peft_model(base_model(), config), 0.1)
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def test_ia3_is_kept_unless_it_is_asked_for_and_starts_from_one(tmp_path):
    config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    tensors = adapter(tmp_path / "in", config)
    compress(tmp_path / "in", tmp_path / "x", density=0.25)
    decompress(tmp_path / "x", tmp_path / "same")
    for name, tensor in load_file(tmp_path / "same/adapter_model.safetensors").items():
        assert torch.equal(tensor, tensors[name])
    report = compress(tmp_path / "in", tmp_path / "x", density=0.25, include={"ia3"})
    assert {tensor.name for tensor in report.tensors} == set(tensors)
    decompress(tmp_path / "x", tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, tensor in tensors.items():
        moved = tensor.numpy() - 1
        kept = np.abs(got[name].numpy() - 1) > 1e-7
        assert kept.sum() == round(0.25 * moved.size)
        scale = np.sqrt(np.sum(moved**2) / kept.sum())
        np.testing.assert_allclose(got[name].numpy(), 1 + kept * np.sign(moved) * scale, rtol=1e-5)
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "out"))
    found = {name.replace(".default", ""): tensor for name, tensor in loaded.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in got.items())


def test_saved_modules_stay_unless_they_are_asked_for(folders):
    config = LoraConfig(r=16, target_modules=["key", "value"], modules_to_save=["pooler", "word_embeddings"])
    tensors = adapter(folders / "in", config)
    saved = {name for name in tensors if "pooler" in name or "word_embeddings" in name}
    assert len(saved) == 3
    compress(folders / "in", folders / "x")
    decompress(folders / "x", folders / "same")
    got = load_file(folders / "same/adapter_model.safetensors")
    assert all(torch.equal(got[name], tensors[name]) for name in saved)
    with pytest.raises(BaseMismatch):
        compress(folders / "in", folders / "x", include=["saved"])
    compress(folders / "in", folders / "x", include=["saved"], base=folders / "base", density=0.1)
    decompress(folders / "x", folders / "out", base=folders / "base")
    got = load_file(folders / "out/adapter_model.safetensors")
    base = load_file(folders / "base/model.safetensors")
    for name in saved:
        start = base[name.removeprefix("base_model.model.")]
        assert (got[name] != start).sum() == max(1, round(0.1 * start.numel())), name
    PeftModel.from_pretrained(base_model(), str(folders / "out"))


def test_heads_can_be_rounded_to_bfloat16(tmp_path):
    config = LoraConfig(r=16, target_modules=["key", "value"], modules_to_save=["pooler"])
    tensors = adapter(tmp_path / "in", config)
    plain = compress(tmp_path / "in", tmp_path / "x")
    small = compress(tmp_path / "in", tmp_path / "y", heads="bf16")
    assert plain.planes_sha256 == small.planes_sha256
    assert plain.bytes - small.bytes == pytest.approx(2 * (48 * 48 + 48), abs=16)
    decompress(tmp_path / "y", tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in tensors:
        if "pooler" in name:
            assert torch.equal(got[name], tensors[name].to(torch.bfloat16))


def test_the_config_travels_beside_the_file(tmp_path):
    adapter(tmp_path / "in", LoraConfig(r=32, target_modules=["key"]))
    compress(tmp_path / "in", tmp_path / "away.compeft")
    original = (tmp_path / "in/adapter_config.json").read_bytes()
    assert (tmp_path / "away.compeft.adapter_config.json").read_bytes() == original
    shutil.rmtree(tmp_path / "in")
    decompress(tmp_path / "away.compeft", tmp_path / "out")
    assert (tmp_path / "out/adapter_config.json").read_bytes() == original
    decompress(tmp_path / "away.compeft", tmp_path / "other", config=b"{}")
    assert (tmp_path / "other/adapter_config.json").read_bytes() == b"{}"


def test_int4_brings_an_adapter_back_almost_as_it_was(tmp_path):
    tensors = adapter(tmp_path / "in", LoraConfig(r=32, target_modules=["key", "value"], use_dora=True))
    report = compress(tmp_path / "in", tmp_path / "x", preset="int4")
    assert report.preset == "int4"
    assert report.density == 1.0
    assert report.product_cosine > 0.98
    assert report.kept == report.size == 4 * 32 * 48
    decompress(tmp_path / "x", tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")
    product = {}
    for name, tensor in tensors.items():
        if "lora_magnitude" in name:
            assert torch.equal(got[name], tensor)
            continue
        assert torch.allclose(got[name], tensor, atol=float(tensor.abs().max()) / 12)
        product[name] = (tensor.double(), got[name].double())
    sums = np.zeros(3)
    for name, (A, A_seen) in product.items():
        if "lora_A" in name:
            B, B_seen = product[name.replace("lora_A", "lora_B")]
            one, other = B @ A, B_seen @ A_seen
            sums += [float((one * one).sum()), float((one * other).sum()), float((other * other).sum())]
    assert report.product_cosine == pytest.approx(sums[1] / np.sqrt(sums[0] * sums[2]), rel=1e-6)
    PeftModel.from_pretrained(base_model(), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"preset": "int4", "density": 0.1}, "density"),
        ({"preset": "int4", "scale_rule": "norm"}, "scale_rule"),
        ({"include": ["heads"]}, "include"),
        ({"heads": "fp8"}, "heads"),
        ({"preset": "best"}, "preset"),
    ],
)
def test_options_without_meaning_are_refused(tmp_path, options, pointer):
    adapter(tmp_path / "in", LoraConfig(r=8, target_modules=["key"]))
    with pytest.raises(ParameterInvalid) as caught:
        compress(tmp_path / "in", tmp_path / "x", **options)
    assert caught.value.pointer == pointer
    assert not list(tmp_path.glob("x*"))


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "in/adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterInvalid, match=r"no adapter_model\.safetensors"):
        compress(tmp_path / "in", tmp_path / "x")


def checkpoints_of(folder, dtype):
    """A base and a checkpoint tuned from it, with a long vector, a small matrix and a head of its own."""
    shapes = {"layer.weight": (40, 60), "layer.bias": (3000,), "small.weight": (10, 10), "steps": ()}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    base["steps"] = torch.tensor(7)
    tuned = {name: tensor + torch.ones_like(tensor) for name, tensor in base.items()}
    tuned["head.weight"] = torch.randn((50, 50), generator=generator)
    for name, tensors in {"base": base, "tuned": tuned}.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_alone_are_compressed_in_any_half_precision(tmp_path, dtype):
    tuned = checkpoints_of(tmp_path, dtype)
    report = compress(tmp_path / "tuned", tmp_path / "x", base=tmp_path / "base")
    assert [tensor.name for tensor in report.tensors] == ["layer.weight"]
    assert report.density == 0.2
    decompress(tmp_path / "x", tmp_path / "out", base=tmp_path / "base")
    got = load_file(tmp_path / "out/model.safetensors")
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: t.dtype for name, t in tuned.items()}
    assert all(torch.equal(got[name], tuned[name]) for name in tuned if name != "layer.weight")
    small = compress(
        tmp_path / "tuned", tmp_path / "y", base=tmp_path / "base", heads="bf16", base_parameters=2 * 10**9
    )
    assert small.density == 0.1
    decompress(tmp_path / "y", tmp_path / "out", base=tmp_path / "base")
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["head.weight"], tuned["head.weight"].to(torch.bfloat16))
    assert got["steps"] == 8


def test_a_base_tensor_of_another_shape_is_named():
    with pytest.raises(AdapterInvalid) as caught:
        compeft.encode({"w": np.ones((4, 6), np.float32)}, {}, initial={"w": np.ones(6, np.float32)})
    assert caught.value.pointer == "w"


def test_a_plain_decoder_reads_a_full_fine_tune(folders):
    compress(folders / "tuned", folders / "x", base=folders / "base", density=0.3)
    base = load_file(folders / "base/model.safetensors")
    given = {f"bert.{name}": tensor.reshape(-1).tolist() for name, tensor in base.items()}
    expected = reference.decode((folders / "x").read_bytes(), given)
    decompress(folders / "x", folders / "out", base=folders / "base")
    got = load_file(folders / "out/model.safetensors")
    for name, (_, shape, values) in expected.items():
        assert tuple(got[name].shape) == shape
        assert got[name].reshape(-1).tolist() == values
