"""Tiny base models made in memory, and real adapters on them, made and saved by stock PEFT. Needs torch."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

HIDDEN = 16
VOCABULARY = 40


def bert(seed: int = 0) -> BertModel:
    """Two layers, 16 wide; the same seed gives the same weights."""
    return copy.deepcopy(_bert(seed))


@functools.cache
def _bert(seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return _with_biases(BertModel(config).eval())


def gpt2(seed: int = 0) -> GPT2Model:
    """A model of Conv1D layers, whose weights are stored (in, out)."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=HIDDEN, n_layer=2, n_head=2,
                        initializer_range=0.1)  # fmt: skip
    return _with_biases(GPT2Model(config).eval())


def _with_biases(model: torch.nn.Module) -> Any:
    """Biases that are not zero, as in a base that was trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.2)
    return model


class Layers(torch.nn.Module):
    """One layer of each form that LoRA can adapt."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(12, 6)
        self.narrow = torch.nn.Conv1d(6, 4, kernel_size=3, padding=1)
        self.wide = torch.nn.Conv2d(3, 4, kernel_size=(3, 2))
        self.line = torch.nn.Linear(6, 5)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.embedding(tokens)
        return found, self.narrow(found.transpose(1, 2)), self.wide(image), self.line(found)


def tokens(count: int = 3, length: int = 7, *, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(5))


def trained(base: torch.nn.Module, config: PeftConfig, seed: int = 1) -> PeftModel:
    """An adapter as after training: every adapter parameter, also those PEFT starts at zero, holds noise."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(folder: Path, config: PeftConfig, *, base: Callable[[], torch.nn.Module] = bert, seed: int = 1) -> PeftModel:
    """Train, save to `folder` as PEFT does, and return the model."""
    model = trained(base(), config, seed)
    # The card takes longer than all the rest.
    model.create_or_update_model_card = lambda _: None
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def checkpoint(folder: Path, *, base: Callable[[], torch.nn.Module] = bert, prefix: str = "") -> Path:
    """The base's weights as a checkpoint, as a hub's operator has them."""
    folder.mkdir()
    state = {prefix + name: tensor.clone().contiguous() for name, tensor in base().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """All that a tiny model puts out for one fixed input."""
    with torch.no_grad():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if isinstance(base, Layers):
            image = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
            return list(model(tokens(vocabulary=12), image))
        found = model(tokens())
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def loaded(folder: Path, *, base: Callable[[], torch.nn.Module] = bert) -> PeftModel:
    """What stock PEFT makes of a folder."""
    return PeftModel.from_pretrained(base(), str(folder)).eval()


def lora(**changes: Any) -> LoraConfig:
    """A LoRA with a scaling that is not 1."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], "lora_dropout": 0.1}
    return LoraConfig(**(settings | changes))


def allocated(folder: Path, **changes: Any) -> PeftModel:
    """An AdaLoRA that was trained until its ranks were decided, saved as PEFT does."""
    settings: dict[str, Any] = {"init_r": 4, "target_r": 3, "lora_alpha": 7, "tinit": 1, "tfinal": 1, "total_step": 6,
                                "target_modules": ["query", "value"]}  # fmt: skip
    model = trained(bert(), AdaLoraConfig(**(settings | changes))).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for step in range(settings["total_step"]):
        model(tokens()).last_hidden_state.pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(folder, save_embedding_layers=False)
    return model


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself adds to each base weight, by module name, in the base's own orientation."""
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
