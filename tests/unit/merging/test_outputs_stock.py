"""Stock PEFT and transformers load what merges are written as, and compute with it what torch works out by itself."""

import json

import numpy as np
import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moerge.tensors.bases import BaseWeights
from tests.unit.merging import disk

# PEFT asks transformers for an attribute that goes away with its next major version.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(24).reshape(3, 8)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 16}  # fmt: skip
TARGETS = ["q_proj", "down_proj"]


def llama(**changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).eval()


def biased():
    return llama(attention_bias=True)


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def trained(folder, config, *, base=llama, seed=0):
    """An adapter with noise in all it trains, saved by PEFT, and the model that has it."""
    model = peft.get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def lora(**changes):
    return peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | changes))


def weights_of(model):
    """What the model's tensors are once the adapter is part of them."""
    return {name: value.double() for name, value in model.merge_and_unload().state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def merge_full(tmp_path, configs, weights, *, base=llama, method="linear", shard="10GB", **output):
    """Experts of these configs merged into full weights; returns their models and the folder."""
    base().save_pretrained(tmp_path / "base", max_shard_size=shard)
    models = [trained(tmp_path / f"e{i}", config, base=base, seed=i) for i, config in enumerate(configs)]
    with BaseWeights(tmp_path / "base") as opened:
        experts = [disk.load(tmp_path / f"e{i}", base=opened) for i in range(len(configs))]
        disk.merge(tmp_path / "out", experts, weights, method, output={"kind": "full", **output}, base=opened)
    return models, tmp_path / "out"


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_full_weights_of_dora_and_lora_are_the_base_and_their_changes(tmp_path, shard):
    configs, weights = [lora(use_dora=True), lora(r=2)], [0.7, -0.4]
    models, out = merge_full(tmp_path, configs, weights, shard=shard)
    own = llama().state_dict()
    wanted = {name: value.double() for name, value in own.items()}
    for weight, model in zip(weights, models, strict=True):
        for name, value in weights_of(model).items():
            wanted[name] = wanted[name] + weight * (value - own[name])
    merged = LlamaForCausalLM.from_pretrained(out).eval()
    moved = 0
    for name, value in merged.state_dict().items():
        np.testing.assert_allclose(value.double(), wanted[name], atol=1e-5)
        moved += int((value != own[name]).any())
    assert moved == 2 * len(TARGETS)
    assert len(list(out.glob("*.safetensors"))) == len(list((tmp_path / "base").glob("*.safetensors")))
    assert (shard == "10GB") == (out / "model.safetensors").is_file()


def test_a_tied_head_stays_tied(tmp_path):
    models, out = merge_full(tmp_path, [lora()], [1.0], base=lambda: llama(tie_word_embeddings=True))
    merged = LlamaForCausalLM.from_pretrained(out).eval()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    np.testing.assert_allclose(logits(merged), logits(models[0]), atol=1e-5)


def test_layers_stored_by_inputs_get_their_change_the_right_way_round(tmp_path):
    config = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    models, out = merge_full(tmp_path, [config], [1.0], base=gpt2)
    np.testing.assert_allclose(logits(GPT2LMHeadModel.from_pretrained(out).eval()), logits(models[0]), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.* have invalid shape")  # PEFT's, of its own biases
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_whole_modules_and_biases_come_back_with_the_factors(tmp_path, kind):
    """One expert of weight one computes after the merge what it computed before."""
    config = lora(modules_to_save=["lm_head"], lora_bias=True, target_modules=["q_proj"])
    biased().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "a", config, base=biased)
    with BaseWeights(tmp_path / "base") as opened:
        expert = disk.load(tmp_path / "a", base=opened)
        disk.merge(tmp_path / "out", [expert], [1.0], output={"kind": kind}, base=opened)
    if kind == "lora":
        merged = peft.PeftModel.from_pretrained(biased(), tmp_path / "out").eval()
    else:
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)
    assert np.abs(logits(model) - logits(biased())).max() > 1e-2


def test_two_heads_are_averaged_as_changes_of_the_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    models = [trained(tmp_path / name, lora(modules_to_save=["lm_head"]), seed=i) for i, name in enumerate("ab")]
    with BaseWeights(tmp_path / "base") as opened:
        experts = [disk.load(tmp_path / name, base=opened) for name in "ab"]
        disk.merge(tmp_path / "out", experts, [0.5, 0.5], base=opened)
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    heads = [model.base_model.model.lm_head.modules_to_save["default"].weight for model in models]
    found = merged.base_model.model.lm_head.modules_to_save["default"].weight
    np.testing.assert_allclose(found.detach(), ((heads[0] + heads[1]) / 2).detach(), atol=1e-6)


@pytest.mark.parametrize("changes", [{"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_what_two_experts_replace_is_merged_as_changes_in_an_adapter(tmp_path, changes):
    configs, weights = [lora(target_modules=["q_proj"], **changes), lora(r=2, **changes)], [0.7, -0.4]
    biased().save_pretrained(tmp_path / "base")
    models = [trained(tmp_path / f"e{i}", config, base=biased, seed=i) for i, config in enumerate(configs)]
    with BaseWeights(tmp_path / "base") as opened:
        experts = [disk.load(tmp_path / f"e{i}", base=opened) for i in range(2)]
        disk.merge(tmp_path / "out", experts, weights, base=opened)
    own = biased().state_dict()
    wanted = {name: value.double() for name, value in own.items()}
    for weight, model in zip(weights, models, strict=True):
        for name, value in weights_of(model).items():
            wanted[name] = wanted[name] + weight * (value - own[name])
    merged = weights_of(peft.PeftModel.from_pretrained(biased(), tmp_path / "out").eval())
    for name, value in merged.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5)
    assert sum(int((value != own[name]).any()) for name, value in merged.items()) > 2 * len(TARGETS)


def ia3(**changes):
    return peft.IA3Config(**({"target_modules": TARGETS, "feedforward_modules": ["down_proj"]} | changes))


def test_one_ia3_expert_of_weight_one_computes_as_before(tmp_path):
    model = trained(tmp_path / "a", ia3())
    for method in ("linear", "ties", "tsv_m", "opcm"):
        parameters = {"density": 1.0} if method == "ties" else {}
        out = tmp_path / method
        expert = disk.load(tmp_path / "a")
        disk.merge(out, [expert], [1.0], method, parameters=parameters, output={"kind": "ia3"})
        merged = peft.PeftModel.from_pretrained(llama(), out).eval()
        np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)
    assert np.abs(logits(model) - logits(llama())).max() > 1e-3


def test_gains_of_two_ia3_experts_are_averaged_in_the_model(tmp_path):
    models = [trained(tmp_path / name, ia3(), seed=i) for i, name in enumerate("ab")]
    disk.merge(
        tmp_path / "out", [disk.load(tmp_path / name) for name in "ab"], [0.5, 0.5], output={"kind": "ia3"}
    )  # fmt: skip
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    averaged = models[0]
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            if "ia3_l" in name:
                parameter.copy_((parameter + models[1].get_parameter(name)) / 2)
    np.testing.assert_allclose(logits(merged), logits(averaged), atol=1e-5)


def test_ia3_and_lora_meet_as_changes_of_the_base(tmp_path):
    configs, weights = [ia3(), lora()], [1.0, 0.5]
    models, out = merge_full(tmp_path, configs, weights)
    own = llama().state_dict()
    wanted = {name: value.double() for name, value in own.items()}
    for weight, model in zip(weights, models, strict=True):
        for name, value in weights_of(model).items():
            wanted[name] = wanted[name] + weight * (value - own[name])
    for name, value in LlamaForCausalLM.from_pretrained(out).state_dict().items():
        np.testing.assert_allclose(value.double(), wanted[name], atol=1e-5)


def test_the_config_beside_full_weights_is_the_base_s(tmp_path):
    _, out = merge_full(tmp_path, [lora()], [1.0], dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 16
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}
    assert LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
