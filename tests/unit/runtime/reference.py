"""Routing as the papers write it: a module that goes through its tokens and experts one by one, and bases to put it in.

Nothing of `moerge.runtime` is used: factors come from the files, scalings from the configs as PEFT documents them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

VOCABULARY = 40
PREFIX = "base_model.model."


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class Part:
    """One expert's factors in one module."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def delta(self) -> torch.Tensor:
        return self.scaling * self.B @ self.A


def parts(folder: Path, *, alpha_of: Mapping[str, float] | None = None) -> dict[str, Part]:
    """By module; `alpha_of` are alphas that the config's alpha_pattern gives, by module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, A in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = A.shape[0]
        alpha = (alpha_of or {}).get(module, config["lora_alpha"])
        found[module] = Part(
            A, tensors[f"{PREFIX}{module}.lora_B.weight"], alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        )
    return found


def leading(part: Part) -> np.ndarray:
    """The leading right singular vector of the delta, by a full SVD in double precision."""
    return np.linalg.svd(part.delta.double().numpy())[2][0].astype(np.float32)


def normal(values: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, as torch's default has it."""
    centred = values - values.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5)


def softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


# (token, row of the batch, {expert: vector}) -> {expert: weight}.
Rule = Callable[[torch.Tensor, int, Mapping[int, torch.Tensor]], Mapping[int, float]]


def arrow(top_k: int, temperature: float) -> Rule:
    def rule(token: torch.Tensor, _: int, vectors: Mapping[int, torch.Tensor]) -> Mapping[int, float]:
        logits = {expert: abs(float(token @ vector)) for expert, vector in vectors.items()}
        kept = sorted(logits, key=logits.__getitem__, reverse=True)[:top_k]
        return dict(zip(kept, softmax([logits[expert] / temperature for expert in kept]), strict=True))

    return rule


def phatgoose(top_k: int, *, alpha: float = 0.0, scores: Sequence[Sequence[float]] = ()) -> Rule:
    """With `scores` of every expert by row, GLIDER."""

    def rule(token: torch.Tensor, row: int, vectors: Mapping[int, torch.Tensor]) -> Mapping[int, float]:
        logits = {
            expert: float(normal(token) @ normal(vector)) / math.sqrt(len(token))
            + (alpha * scores[row][expert] if scores else 0.0)
            for expert, vector in vectors.items()
        }
        shares = dict(zip(logits, softmax(list(logits.values())), strict=True))
        kept = sorted(shares, key=shares.__getitem__, reverse=True)[:top_k]
        return {expert: shares[expert] / sum(shares[one] for one in kept) for expert in kept}

    return rule


class Looped(torch.nn.Module):
    """A linear layer and its experts, token by token."""

    def __init__(
        self, layer: Any, experts: Mapping[int, Part], vectors: Mapping[int, torch.Tensor], rule: Rule
    ) -> None:
        super().__init__()
        self.layer, self.experts, self.vectors, self.rule = layer, experts, vectors, rule
        self.used: dict[int, float] = {}
        if hasattr(layer, "weight"):
            self.weight = layer.weight

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        output = self.layer(given).clone()
        for row, inputs in enumerate(given):
            for place, token in enumerate(inputs):
                for expert, weight in self.rule(token, row, self.vectors).items():
                    output[row, place] += weight * (self.experts[expert].delta @ token)
                    self.used[expert] = self.used.get(expert, 0.0) + weight
        return output


def looped(
    base: Any, experts: Sequence[Mapping[str, Part]], vectors: Sequence[Mapping[str, torch.Tensor]], rule: Rule
) -> tuple[Any, dict[str, Looped]]:
    """The base with every module that some expert has a vector for replaced."""
    placed = {}
    for module in sorted({name for one in vectors for name in one}):
        here = [number for number, one in enumerate(vectors) if module in one]
        layer = Looped(
            base.get_submodule(module),
            {number: experts[number][module] for number in here},
            {number: vectors[number][module] for number in here},
            rule,
        )
        base.set_submodule(module, layer)
        placed[module] = layer
    return base, placed
