"""A model large enough that its adapters have something to compress, and adapters of every kind on it, saved by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model

WORDS = torch.arange(40).reshape(4, 10) * 7 % 300


class Model(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = torch.nn.Embedding(300, 96)
        self.query = torch.nn.Linear(96, 1200)
        self.value = torch.nn.Linear(1200, 96)
        self.head = torch.nn.Linear(96, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.value(torch.tanh(self.query(self.words(words)))).mean(1))


def lora(**changes: Any) -> PeftConfig:
    return LoraConfig(**({"r": 16, "lora_alpha": 24, "target_modules": ["query"]} | changes))


def ia3() -> PeftConfig:
    return IA3Config(target_modules=["query"], feedforward_modules=[])


def saved(folder: Path, config: PeftConfig) -> dict[str, torch.Tensor]:
    """An adapter after some training, as `save_pretrained` leaves it in `folder`; its tensors by name in the file."""
    model = get_peft_model(Model(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return tensors(folder / "adapter_model.safetensors")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def loaded(folder: Path) -> PeftModel:
    """What stock PEFT makes of a folder."""
    return PeftModel.from_pretrained(Model(), str(folder)).eval()
