"""The tiny base: a word-and-letter tokenizer, a four-layer Llama, and its training from scratch.

The base learns the general tasks, and of the experts' tasks no more than what an input looks like: such inputs come
with the payload itself as their answer. So it answers in the right form, and reads wordings, but solves none of them.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.token_routing import tasks

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
NAME = "tiny-text"  # What the experts' configs and cards call their base.
IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained: `steps`, or fewer where the loss of 20 of them falls to `enough`."""

    steps: int
    batch: int
    learning_rate: float
    enough: float = 0.0


def tokenizer() -> Any:
    """Known words are one token, all else is spelled; spaces are not kept."""
    words = [PAD, END, UNKNOWN, ":", ";", "=", *tasks.LETTERS, *tasks.WORDS]
    model = models.WordPiece(
        {word: number for number, word in enumerate(words)},
        unk_token=UNKNOWN,
        continuing_subword_prefix="",
        max_input_chars_per_word=100,
    )
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )


def model(vocabulary_count: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary_count,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def lesson(chance: random.Random) -> tasks.Item:
    """One item of the base's training: half general tasks, half experts' inputs answered by their own payload."""
    count = chance.randint(1, 2)
    names, parts, pieces = [], [], []
    for _ in range(count):
        is_general = chance.random() < 0.5
        task = chance.choice(tasks.GENERAL if is_general else tasks.ASKED)
        payload, answer = tasks.draw(task, chance, held_out=False)
        names.append(task.name)
        parts.append((chance.choice(task.wordings), payload))
        pieces.append(answer if is_general else payload)
    return tasks.Item(tasks.ask(parts), tuple(pieces), tuple(names))


def batch(tokens: Any, items: Sequence[tasks.Item]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, padded on the right; the loss is on the answers alone."""
    inputs = [tokens(item.text)["input_ids"] for item in items]
    answers = [[*tokens(item.answer)["input_ids"], tokens.eos_token_id] for item in items]
    width = max(len(left) + len(right) for left, right in zip(inputs, answers, strict=True))
    ids = torch.full((len(items), width), tokens.pad_token_id)
    labels = torch.full((len(items), width), IGNORED)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    for row, (left, right) in enumerate(zip(inputs, answers, strict=True)):
        end = len(left) + len(right)
        ids[row, :end] = torch.tensor(left + right)
        labels[row, len(left) : end] = torch.tensor(right)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def optimise(
    trained: Any, tokens: Any, *, draw: Callable[[random.Random], tasks.Item], schedule: Schedule, seed: int
) -> float:
    """Train what requires a gradient on items drawn anew for every step; the mean loss of the last 20 steps."""
    chance = random.Random(seed)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=schedule.learning_rate, total_steps=schedule.steps, pct_start=0.1
    )
    losses: deque[float] = deque(maxlen=20)
    trained.train()
    for _ in range(schedule.steps):
        loss = trained(**batch(tokens, [draw(chance) for _ in range(schedule.batch)])).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rate.step()
        losses.append(loss.item())
        if len(losses) == losses.maxlen and mean(losses) <= schedule.enough:
            break
    trained.eval()
    return mean(losses)


def train(folder: Path, *, schedule: Schedule, seed: int) -> float:
    """Trains a base and writes it with its tokenizer to `folder`; the last loss."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    fresh = model(len(tokens))
    loss = optimise(fresh, tokens, draw=lesson, schedule=schedule, seed=seed)
    fresh.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return loss


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
