"""Stock PEFT is the judge: what it computes with a merge is what the parents' deltas add up to."""

import json

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from moerge.merging import recipe, run
from moerge.tensors import adapters


class Net(nn.Module):
    """Linear layers, an embedding, a convolution and GPT-2's transposed linear layer, with fixed weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(30, 16)
        self.q_proj = nn.Linear(16, 24)
        self.v_proj = nn.Linear(24, 16)
        self.conv = nn.Conv2d(1, 3, (3, 2))
        self.c_fc = Conv1D(10, 16)

    def forward(self, tokens):
        hidden = self.v_proj(torch.tanh(self.q_proj(self.embed(tokens))))
        return self.c_fc(hidden) + self.conv(hidden[:, None]).mean()


TOKENS = torch.arange(24).reshape(3, 8)
KINDS = {
    "plain": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9},
    },
    "embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed", "q_proj"]},
    "convolution": {"r": 2, "lora_alpha": 7, "target_modules": ["conv", "q_proj"]},
    "transposed": {"r": 3, "lora_alpha": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True},
}  # fmt: skip


def trained(folder, kind, *, seed=0):
    """An adapter with factors that are not zero, and the model that has it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(Net(), peft.LoraConfig(init_lora_weights=False, **KINDS[kind])).eval()
    if kind == "embedding":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_embedding" in name:
                    parameter.normal_(std=0.2)
    with pytest.MonkeyPatch.context() as patch:
        # PEFT asks the Hub for the base's config when an embedding is targeted; there is none.
        patch.setenv("HF_HUB_OFFLINE", "1")
        model.save_pretrained(folder, save_embedding_layers=False)
    config = adapters.parse_config((folder / "adapter_config.json").read_bytes())
    return model, adapters.load(config, folder / "adapter_model.safetensors")


def merge(folder, experts, weights, method, parameters=None):
    named = [
        {"expert": f"a/{i}", "revision": "r", "digest": adapter.digest, "weight": weight}
        for i, (adapter, weight) in enumerate(zip(experts, weights, strict=True))
    ]
    parsed = recipe.parse({"base_model": "a/b", "method": method, "parameters": parameters or {}, "experts": named})
    run.merge(parsed, {adapter.digest: adapter for adapter in experts}, folder)
    return peft.PeftModel.from_pretrained(Net(), folder).eval()


def deltas(model):
    return {
        name: module.get_delta_weight("default").detach().numpy().astype(np.float64)
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method", ["linear", "cat", "svd", "tsv_m", "opcm"])
def test_one_expert_of_weight_one_behaves_as_before(tmp_path, kind, method):
    model, adapter = trained(tmp_path / "one", kind)
    merged = merge(tmp_path / "out", [adapter], [1.0], method)
    with torch.no_grad():
        wanted, plain = model(TOKENS), Net()(TOKENS)
        np.testing.assert_allclose(merged(TOKENS), wanted, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["linear", "cat", "task_arithmetic"])
def test_experts_of_all_sorts_add_up(tmp_path, method):
    kinds, weights = ["plain", "rslora", "patterns", "embedding"], [0.7, 0.3, -0.4, 1.2]
    parents = [trained(tmp_path / kind, kind, seed=i) for i, kind in enumerate(kinds)]
    found = deltas(merge(tmp_path / "out", [adapter for _, adapter in parents], weights, method))
    wanted = {}
    for weight, (model, _) in zip(weights, parents, strict=True):
        for name, delta in deltas(model).items():
            wanted[name] = wanted.get(name, 0) + weight * delta
    assert found.keys() == wanted.keys() == {"embed", "q_proj", "v_proj"}
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters", "combination", "options"),
    [
        ("svd", {}, "svd", {}),
        ("ties", {"variant": "peft", "density": 0.4}, "ties_svd", {"density": 0.4}),
        ("ties", {"variant": "peft", "density": 0.6, "elect": "frequency"}, "ties_svd",
         {"density": 0.6, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.4, "min_keep": 0}, "magnitude_prune_svd", {"density": 0.4}),
    ],
)  # fmt: skip
def test_peft_itself_merges_to_the_same_delta(tmp_path, method, parameters, combination, options):
    weights = [0.7, 0.9]
    (model, first), (_, second) = (trained(tmp_path / f"e{i}", "plain", seed=i) for i in range(2))
    model.load_adapter(tmp_path / "e1", "other")
    options = {**options, "combination_type": combination, "svd_rank": 16, "svd_full_matrices": False}
    model.add_weighted_adapter(["default", "other"], weights, "merged", **options)
    merge(tmp_path / "out", [first, second], weights, method, parameters)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = config["r"]
    found = deltas(peft.PeftModel.from_pretrained(Net(), tmp_path / "out"))
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            U, S, Vt = np.linalg.svd(module.get_delta_weight("merged").detach().numpy().astype(np.float64))
            np.testing.assert_allclose(found[name], (U[:, :rank] * S[:rank]) @ Vt[:rank], atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "embedding", "convolution", "transposed"])
@pytest.mark.parametrize(
    ("method", "parameters", "combination"),
    [
        ("peft_linear", {}, "linear"),
        ("peft_ties", {"density": 0.4}, "ties"),
        ("peft_ties", {"density": 0.6, "elect": "frequency"}, "ties"),
        ("peft_magnitude_prune", {"density": 0.4}, "magnitude_prune"),
        ("peft_dare_linear", {"density": 1.0}, "dare_linear"),
        ("peft_dare_ties", {"density": 1.0}, "dare_ties"),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
def test_peft_itself_merges_factors_apart_to_the_same_delta(tmp_path, kind, method, parameters, combination):
    weights = [0.7, -0.9]
    (model, first), (_, second) = (trained(tmp_path / f"e{i}", kind, seed=i) for i in range(2))
    model.load_adapter(tmp_path / "e1", "other")
    options = {"combination_type": combination, "density": parameters.get("density")}
    options |= {"majority_sign_method": parameters["elect"]} if "elect" in parameters else {}
    model.add_weighted_adapter(["default", "other"], weights, "merged", **options)
    merged = merge(tmp_path / "out", [first, second], weights, method, parameters)
    found = {
        name: module for name, module in merged.base_model.model.named_modules() if hasattr(module, "get_delta_weight")
    }
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            wanted = module.get_delta_weight("merged").detach().numpy()
            np.testing.assert_allclose(found.pop(name).get_delta_weight("default").detach().numpy(), wanted, atol=1e-5)
            assert np.abs(wanted).max() > 1e-3
    assert not found
