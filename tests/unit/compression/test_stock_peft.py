"""Compressed and brought back, an adapter is loaded by stock PEFT and computes with the decoded factors."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moerge.compression import compress_adapter, decompress
from moerge.compression.codecs import compeft
from moerge.tensors.files import BF16
from tests.unit.compression import samples


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(300, 96)
        self.query = torch.nn.Linear(96, 200)
        self.head = torch.nn.Linear(200, 3)

    def forward(self, words):
        return self.head(torch.tanh(self.query(self.words(words)).mean(1)))


WORDS = torch.arange(40).reshape(4, 10) * 7 % 300


def trained(folder, **options):
    """An adapter with every factor away from zero, saved by PEFT."""
    model = get_peft_model(Tiny(), LoraConfig(**({"r": 16, "lora_alpha": 24, "target_modules": ["query"]} | options)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def factors(model, module):
    """A, B and scaling of a loaded layer."""
    layer = dict(model.named_modules())[module]
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], layer.scaling["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 6.0),
        ({"use_dora": True}, 1.5),
        ({"modules_to_save": ["head"]}, 1.5),
        ({"bias": "lora_only", "lora_bias": False}, 1.5),
    ],
    ids=["lora", "rslora", "dora", "head", "bias"],
)
def test_a_compressed_adapter_comes_back_for_peft(tmp_path, options, scaling):
    original = trained(tmp_path / "in", **options)
    weights, encoded = tmp_path / "in" / "adapter_model.safetensors", tmp_path / "in" / "adapter.compeft"
    config = (tmp_path / "in" / "adapter_config.json").read_bytes()
    report = compress_adapter(config, weights, encoded, density=0.2)
    assert report.size == 16 * (96 + 200)
    decompress(encoded, tmp_path / "out")
    loaded = PeftModel.from_pretrained(Tiny(), str(tmp_path / "out"))
    decoded = compeft.decode(encoded.read_bytes())
    A, B, factor = factors(loaded, "base_model.model.query")
    assert factor == pytest.approx(scaling)
    np.testing.assert_array_equal(A.detach().numpy(), decoded["base_model.model.query.lora_A.weight"])
    np.testing.assert_array_equal(B.detach().numpy(), decoded["base_model.model.query.lora_B.weight"])
    # What is not a factor is the trained tensor, bit for bit.
    expected = {
        name: value
        for name, value in original.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, value in loaded.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name]), name
    if "use_dora" not in options:
        by_hand = Tiny()
        if "modules_to_save" in options:
            by_hand.head.load_state_dict(original.base_model.model.head.modules_to_save["default"].state_dict())
        with torch.no_grad():
            by_hand.query.weight += scaling * (B @ A)
            assert torch.allclose(loaded(WORDS), by_hand(WORDS), atol=1e-5)
            assert not torch.allclose(loaded(WORDS), Tiny()(WORDS), atol=1e-3)


def test_embeddings_are_compressed_for_peft_too(tmp_path):
    trained(tmp_path / "in", target_modules=["words", "query"])
    weights, encoded = tmp_path / "in" / "adapter_model.safetensors", tmp_path / "in" / "adapter.compeft"
    report = compress_adapter((tmp_path / "in" / "adapter_config.json").read_bytes(), weights, encoded, density=0.1)
    assert {module.module for module in report.modules} == {"base_model.model.query", "base_model.model.words"}
    decompress(encoded, tmp_path / "out")
    loaded = PeftModel.from_pretrained(Tiny(), str(tmp_path / "out"))
    decoded = compeft.decode(encoded.read_bytes())
    A, B, _ = factors(loaded, "base_model.model.words")
    np.testing.assert_array_equal(A.detach().numpy(), decoded["base_model.model.words.lora_embedding_A"])
    np.testing.assert_array_equal(B.detach().numpy(), decoded["base_model.model.words.lora_embedding_B"])
    assert np.count_nonzero(A.detach().numpy()) == 480


def test_decoded_bfloat16_becomes_a_torch_tensor_without_a_copy():
    tensors = {name: samples.bf16(values) for name, values in samples.lora(np.random.default_rng(0)).items()}
    for tensor in compeft.decode(compeft.encode(tensors, {})).values():
        assert isinstance(tensor, BF16)
        seen = torch.from_numpy(tensor.bits.view(np.int16)).view(torch.bfloat16)
        assert seen.data_ptr() == tensor.bits.ctypes.data
        np.testing.assert_array_equal(seen.float().numpy(), samples.values_of(tensor))
