"""Adapters that stock PEFT made: the deltas are PEFT's own, and what we save runs in PEFT."""

import warnings

import numpy as np
import pytest
import torch
from peft import (
    LoHaConfig,
    PeftModel,
)

from moerge.tensors import adapters, files, header, saving
from tests import tiny_peft as tiny

# PEFT warns about what these settings are good for; the test of a saved adapter turns warnings into errors again.
pytestmark = pytest.mark.filterwarnings("ignore")


def read(folder):
    config = adapters.parse_config((folder / saving.CONFIG).read_bytes())
    path = folder / saving.WEIGHTS
    head = header.read(path)
    files.check_agreement(path, head)
    assert adapters.scan_finite(path, head) == ()
    return config, head, path


DELTAS = {
    "alpha is not the rank": (tiny.lora(), tiny.bert),
    "rsLoRA": (tiny.lora(use_rslora=True), tiny.bert),
    "patterns": (
        tiny.lora(
            rank_pattern={r"layer\.[1]\.attention.*": 5, "query": 2},
            alpha_pattern={"layer.0.attention.self.query": 11, "value": 3},
        ),
        tiny.bert,
    ),
    "patterns and rsLoRA": (tiny.lora(use_rslora=True, rank_pattern={"value": 2}, alpha_pattern={"query": 5}), tiny.bert),
    "alphas whose order PEFT changes when it saves": (
        tiny.lora(alpha_pattern={"query": 2, "encoder.layer.1.attention.self.query": 9}), tiny.bert,
    ),
    "a regular expression": (tiny.lora(target_modules=r"encoder\.layer\.\d\.(attention\.self\.key|output\.dense)"), tiny.bert),
    "all linear layers": (tiny.lora(target_modules="all-linear"), tiny.bert),
    "one layer": (tiny.lora(layers_to_transform=[1]), tiny.bert),
    "without one module": (tiny.lora(exclude_modules=["layer.1.attention.self.query"]), tiny.bert),
    "an embedding": (tiny.lora(target_modules=["word_embeddings", "query"]), tiny.bert),
    "Conv1D layers that store (in, out)": (tiny.lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tiny.gpt2),
    "embedding, convolutions and line": (tiny.lora(target_modules=["embedding", "narrow", "wide", "line"]), tiny.Layers),
    "MiCA": (tiny.lora(init_lora_weights="mica"), tiny.bert),
    "VeLoRA": (tiny.lora(velora_config={}), tiny.bert),
    "LoHa": (LoHaConfig(r=3, alpha=7, target_modules=["query", "value"], rank_pattern={"query": 2}), tiny.bert),
}  # fmt: skip


@pytest.mark.parametrize("name", DELTAS)
def test_the_deltas_are_those_that_peft_adds_after_loading(name, tmp_path):
    peft_config, base = DELTAS[name]
    tiny.saved(tmp_path, peft_config, base=base)
    config, _, path = read(tmp_path)
    adapter = adapters.load(config, path)
    wanted = tiny.deltas(tiny.loaded(tmp_path, base=base))
    assert wanted.keys() == adapter.modules.keys()
    for module, delta in wanted.items():
        found = adapter.modules[module]
        assert np.allclose(found.weight_delta(fan_in_fan_out=config.fan_in_fan_out), delta.numpy(), atol=2e-6), module
        assert found.shape == adapter.facts.shapes[module]
        assert found.rank == adapter.facts.ranks[module]
        assert float(delta.abs().max()) > 0.1


def apply(base, summed, *, transposed=False):
    """The base with sums of deltas added to its weights, by numpy."""
    for module, delta in summed.items():
        weight = base.get_submodule(module).weight
        with torch.no_grad():
            weight += torch.from_numpy(np.ascontiguousarray(delta.T if transposed else delta)).reshape(weight.shape)
    return base


@pytest.mark.parametrize(
    ("base", "first", "second", "transposed"),
    [
        (
            tiny.bert,
            tiny.lora(rank_pattern={"query": 2}),
            tiny.lora(r=4, use_rslora=True, target_modules=["value", "key"]),
            False,
        ),
        (
            tiny.gpt2,
            tiny.lora(target_modules=["c_attn"], fan_in_fan_out=True),
            tiny.lora(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
            True,
        ),
    ],
)
def test_a_saved_sum_runs_in_stock_peft_as_base_plus_deltas(base, first, second, transposed, tmp_path):
    weights = {"first": 0.7, "second": -0.4}
    found = {}
    for seed, (name, peft_config) in enumerate({"first": first, "second": second}.items()):
        tiny.saved(tmp_path / name, peft_config, base=base, seed=seed)
        config, _, path = read(tmp_path / name)
        found[name] = adapters.load(config, path)
    merged, summed = {}, {}
    for module in found["first"].modules.keys() | found["second"].modules.keys():
        parts = [
            (weights[name], adapter.modules[module]) for name, adapter in found.items() if module in adapter.modules
        ]
        merged[module] = (
            np.hstack([weight * part.scaling * part.B for weight, part in parts]),
            np.vstack([part.A for _, part in parts]),
        )
        summed[module] = sum(weight * part.scaling * part.B.astype(np.float64) @ part.A for weight, part in parts).astype(np.float32)  # fmt: skip
    adapters.save_lora(tmp_path / "merged", merged, base_model=None, fan_in_fan_out=transposed)
    with warnings.catch_warnings():
        # Missing or unexpected keys, and patterns without a match, are warnings of these two kinds.
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model = PeftModel.from_pretrained(base(), str(tmp_path / "merged")).eval()
    with torch.no_grad():
        output = model(tiny.tokens()).last_hidden_state
        wanted = apply(base(), summed, transposed=transposed)(tiny.tokens()).last_hidden_state
        untouched = base()(tiny.tokens()).last_hidden_state
    assert float((output - wanted).abs().max()) < 1e-5
    assert float((output - untouched).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_every_form_of_layer_comes_back_from_a_saved_adapter(dtype, tmp_path):
    tiny.saved(tmp_path / "a", tiny.lora(target_modules=["embedding", "narrow", "wide", "line"]), base=tiny.Layers)
    config, _, path = read(tmp_path / "a")
    adapter = adapters.load(config, path)
    pairs = {module: (part.scaling * part.B, part.A) for module, part in adapter.modules.items()}
    adapters.save_lora(tmp_path / "b", pairs, base_model=None, layouts=adapter.facts.layouts, dtype=dtype)
    inputs = (tiny.tokens(vocabulary=12), torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        wanted = tiny.loaded(tmp_path / "a", base=tiny.Layers)(*inputs)
        found = tiny.loaded(tmp_path / "b", base=tiny.Layers)(*inputs)
    for one, other in zip(wanted, found, strict=True):
        assert float((one - other).abs().max()) < (1e-5 if dtype == "F32" else 0.1)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, values):
        return self.attention(values, values, values)[0]


def test_both_projections_of_a_multihead_attention_come_back(tmp_path):
    settings = {"target_modules": ["attention"], "lora_dropout": 0.0, "rank_pattern": {"attention": 2}}
    model = tiny.saved(tmp_path / "a", tiny.lora(**settings), base=Attention)
    config, _, path = read(tmp_path / "a")
    adapter = adapters.load(config, path)
    assert list(adapter.modules) == ["attention", "attention.base_layer.out_proj"]
    pairs = {module: (part.scaling * part.B, part.A) for module, part in adapter.modules.items()}
    adapters.save_lora(tmp_path / "b", pairs, base_model=None)
    assert read(tmp_path / "b")[0].target_modules == ("attention",)
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((tiny.loaded(tmp_path / "b", base=Attention)(values) - model(values)).abs().max()) < 1e-4
        assert float((Attention()(values) - model(values)).abs().max()) > 0.1
