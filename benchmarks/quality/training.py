"""Short trainings of an encoder and a linear head on one task: LoRA, IA3, or all weights."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.encoder import Base, Head, pooled
from benchmarks.quality.tasks import Task

KINDS = ("lora", "ia3", "full")
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
HEAD_FILE = "head.safetensors"
HEAD_RATE = 1e-2
RANK = 16
TRAINING_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """How an expert is trained: one pass over `rows` rows drawn by the seed, AdamW, a one-cycle schedule."""

    kind: str
    learning_rate: float
    rows: int
    batch_rows: int = 32

    def label(self, seed: int) -> str:
        """A name for files that no other settings share."""
        return f"seed-{seed}-rows-{self.rows}-batch-{self.batch_rows}-rate-{self.learning_rate:g}"


RATES = {"lora": 1e-3, "ia3": 2e-2, "full": 2e-4}
ROWS = {"banking77": 6400, "clinc150": 7500, "sst2": 3200}


def plan(kind: str, task: str, rows: int | None = None) -> Plan:
    """The settings of a kind on a task; `rows` in place of the task's own number."""
    found = Plan(kind, RATES[kind], ROWS.get(task, 3200))
    return found if rows is None else replace(found, rows=rows)


def trained(base: Base, task: Task, wanted: Plan, *, seed: int, folder: Path) -> Path:
    """The folder of an expert, trained now if it is not there yet: weights, config, head and how it was made."""
    here = folder / wanted.kind / task.name / wanted.label(seed)
    done = here / "training.json"
    if done.is_file():
        return here
    here.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = _model(base, wanted.kind)
    head = torch.nn.Linear(384, len(task.label_names))
    losses = _optimise(base, model, head, task, wanted, seed=seed)
    _save(model, here, wanted.kind)
    save_file({"weight": head.weight.detach(), "bias": head.bias.detach()}, here / HEAD_FILE)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    told = asdict(wanted) | {
        "seed": seed,
        "task": task.name,
        "parameters": count,
        "last_loss": float(np.mean(losses[-10:])),
    }
    # Written last: an expert without it was interrupted, and is trained again.
    done.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return here


def read_head(folder: Path) -> Head:
    """Weight (labels, width) and bias (labels,) of an expert's head."""
    tensors = load_file(folder / HEAD_FILE)
    return tensors["weight"], tensors["bias"]


def _model(base: Base, kind: str) -> Any:
    model = base.fresh()
    if kind == "full":
        return model
    targets = ["query", "key", "value", "output.dense", "intermediate.dense"]
    config = (
        peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=RANK, target_modules=targets)
        if kind == "lora"
        else peft.IA3Config(
            task_type="FEATURE_EXTRACTION",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        )
    )
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    # Dropout would cost a third of the time and is little use in a single pass.
    return adapted.eval()


def _optimise(base: Base, model: Any, head: torch.nn.Linear, task: Task, wanted: Plan, *, seed: int) -> list[float]:
    # A batch is as wide as its longest text: the few long ones are cut.
    tokens = [row[:TRAINING_TOKENS] for row in base.tokens(task.train.texts)]
    encoder = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": encoder, "lr": wanted.learning_rate}, {"params": list(head.parameters()), "lr": HEAD_RATE}]
    # No decay: a word that the task never shows keeps its embedding to the bit.
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    batches = list(_batches(tokens, wanted, seed=seed))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[wanted.learning_rate, HEAD_RATE], total_steps=len(batches), pct_start=0.1
    )
    losses = []
    for rows in batches:
        scores = head(pooled(model, [tokens[row] for row in rows]))
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([task.train.labels[row] for row in rows]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _batches(tokens: Sequence[Sequence[int]], wanted: Plan, *, seed: int) -> Iterator[list[int]]:
    """Random batches of rows drawn without repeats; in a block of eight batches, texts of like length share one."""
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=shuffle).tolist()[: wanted.rows]
    block = 8 * wanted.batch_rows
    for start in range(0, len(order), block):
        order[start : start + block] = sorted(order[start : start + block], key=lambda row: len(tokens[row]))
    batches = [order[start : start + wanted.batch_rows] for start in range(0, len(order), wanted.batch_rows)]
    for index in torch.randperm(len(batches), generator=shuffle).tolist():
        yield batches[index]


def _save(model: Any, folder: Path, kind: str) -> None:
    """Weights and config as stock PEFT and transformers write them."""
    model.save_pretrained(folder, **({} if kind == "full" else {"save_embedding_layers": False}))
