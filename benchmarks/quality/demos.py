"""The demo experts of examples/experts: no head, the nearest label text wins, so that merges are measured alike."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import encoder, tasks
from benchmarks.quality.encoder import Base
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.tasks import Rows

# As in training, see examples/train_experts.py.
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Demo:
    """A demo expert: its folder, the texts it chooses between, and all rows of its test split."""

    name: str
    folder: Path
    label_texts: tuple[str, ...]
    test: Rows

    def first(self, count: int) -> "Demo":
        """The same with about `count` rows spread over the split, all of them for 0."""
        step = max(1, len(self.test) // count) if count else 1
        return replace(self, test=Rows(self.test.texts[::step], self.test.labels[::step]))


def read(data: Path, examples: Path) -> list[Demo]:
    """Every expert of `examples/experts.toml` with its rows. Raises OSError and ValueError for the data."""
    content = tomllib.loads((examples / "experts.toml").read_text(encoding="utf-8"))
    found = []
    for name, expert in content["experts"].items():
        source = content["data"][expert["data"]]
        rows = [row for file in source["test"] for row in tasks.read_rows(data / file)]
        intents = tuple(expert.get("intents") or sorted({label for _, label in rows}))
        spelled = expert.get("label_texts", {})
        texts = tuple(spelled.get(intent, intent.replace("_", " ").lower()) for intent in intents)
        found.append(Demo(name, examples / "experts" / name, texts, tasks.numbered(rows, intents)))
    return found


def outcome(model: Any, demo: Demo, base: Base) -> Outcome:
    """What a model, adapted or not, makes of the rows: cosine with every label text, over the temperature."""
    messages, labels = (_unit(model, texts, base) for texts in (demo.test.texts, demo.label_texts))
    return encoder.outcome(messages @ labels.T / TEMPERATURE, demo.test)


def _unit(model: Any, texts: Sequence[str], base: Base) -> torch.Tensor:
    return torch.nn.functional.normalize(encoder.features(model, base.tokens(texts)), dim=1)
