"""One LoRA expert per task, by stock PEFT, and its card as the hub would have it."""

import json
import random
import zlib
from pathlib import Path
from typing import Any

import peft
import torch

from examples.token_routing import base, tasks
from examples.token_routing.base import Schedule
from moerge import cli
from moerge.routing.cards import Card

RANK = 8
CARD_EXAMPLES = 6
GATES = "routing_gates.safetensors"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seed_of(name: str, seed: int) -> int:
    """A seed of its own for each named thing."""
    return zlib.crc32(f"{name} {seed}".encode())


def lesson(task: tasks.Task, chance: random.Random) -> tasks.Item:
    """What an expert and its gates are trained on: inputs of its task alone, and as often words among others."""
    if chance.random() < 0.5:
        return tasks.single(task.name, chance, held_out=False)
    return tasks.among_others(task.name, chance)


def train(folder: Path, tokens: Any, task: tasks.Task, *, base_folder: Path, schedule: Schedule, seed: int) -> float:
    """Trains the task's expert on the saved base and writes it to `folder`; the last loss."""
    own = seed_of(task.name, seed)
    torch.manual_seed(own)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0
    )
    model = peft.get_peft_model(base.load(base_folder), config)
    model.peft_config["default"].base_model_name_or_path = base.NAME

    def drawn(chance: random.Random, count: int) -> dict[str, torch.Tensor]:
        return base.batch(tokens, [lesson(task, chance) for _ in range(count)])

    loss = base.optimise(model, drawn, schedule=schedule, seed=own)
    model.save_pretrained(folder, save_embedding_layers=False)
    return loss


def train_gates(
    folder: Path, task: tasks.Task, *, base_folder: Path, data: Path, steps: int, lines: int, seed: int
) -> None:
    """PHATGOOSE's gates of an expert by `moerge train-gates`, on fresh inputs of its own task, written to `data`."""
    own = seed_of(f"gates {task.name}", seed)
    chance = random.Random(own)
    items = [lesson(task, chance) for _ in range(lines)]
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"input": item.text, "output": item.answer}) + "\n" for item in items))
    asked = {"--base": base_folder, "--data": data, "--out": folder / GATES, "--steps": steps, "--seed": own}
    named = [str(part) for pair in asked.items() for part in pair]
    if cli.main(["train-gates", str(folder), *named]):
        raise SystemExit(f"The gates of {task.name} were not trained.")


def card(task: tasks.Task, *, number: int) -> Card:
    """What an uploader would write: a sentence, and example inputs."""
    chance = random.Random(seed_of(task.name, 0))
    examples = [tasks.single(task.name, chance, held_out=False).text for _ in range(CARD_EXAMPLES)]
    return Card(
        expert=f"demo/{task.name}",
        base_model=base.NAME,
        name=task.name,
        description=task.description,
        examples=tuple(examples),
        number=number,
    )
