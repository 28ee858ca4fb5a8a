"""The tiny base: a tokenizer of whole words, a four-layer Llama, and its training from scratch.

The base reads rows of words in which neighbours are often of one kind, copies them and names their kinds. So it tells
kinds apart, as a base model does that has read texts, and knows no word's partner.
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
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.token_routing import tasks

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
NAME = "tiny-words"  # What the experts' configs and cards call their base.
IGNORED = -100
GOING_ON = 0.7  # How often a word of a lesson is of its neighbour's kind.
COPIED = 0.7  # How often a lesson is to copy.


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained: `steps`, or fewer where the loss of 20 of them falls to `enough`."""

    steps: int
    batch: int
    learning_rate: float
    enough: float = 0.0


def tokenizer() -> Any:
    """Every word is one token."""
    known = [PAD, END, UNKNOWN, tasks.COPY, tasks.KINDS, *tasks.LEXICON]
    known += [word for words in tasks.LEXICON.values() for word in words]
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def lesson(chance: random.Random) -> tasks.Item:
    """One item of the base's training: a row of words, which is copied or whose kinds are named."""
    kinds: list[str] = []
    for _ in range(chance.randint(2, 2 * tasks.HALF)):
        goes_on = kinds and chance.random() < GOING_ON
        kinds.append(kinds[-1] if goes_on else chance.choice(tuple(tasks.LEXICON)))
    words = tasks.drawn(kinds, chance)
    while tasks.is_held_out(words):
        words = tasks.drawn(kinds, chance)
    if chance.random() < COPIED:
        return tasks.Item(words, words)
    return tasks.Item(words, tuple(kinds), mark=tasks.KINDS)


def batch(tokens: Any, items: Sequence[tasks.Item], *, learns_inputs: bool = False) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, padded on the right; the loss is on the answers, or on the inputs too."""
    inputs = [tokens(item.text)["input_ids"] for item in items]
    answers = [[*tokens(item.answer)["input_ids"], tokens.eos_token_id] for item in items]
    width = max(len(left) + len(right) for left, right in zip(inputs, answers, strict=True))
    ids = torch.full((len(items), width), tokens.pad_token_id)
    labels = torch.full((len(items), width), IGNORED)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    for row, (left, right) in enumerate(zip(inputs, answers, strict=True)):
        end = len(left) + len(right)
        ids[row, :end] = torch.tensor(left + right)
        start = 0 if learns_inputs else len(left)
        labels[row, start:end] = ids[row, start:end]
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def optimise(
    trained: Any,
    draw: Callable[[random.Random, int], dict[str, torch.Tensor]],
    *,
    schedule: Schedule,
    seed: int,
) -> float:
    """Train what requires a gradient on batches drawn anew for every step; the mean loss of the last 20 steps."""
    chance = random.Random(seed)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=schedule.learning_rate, total_steps=schedule.steps, pct_start=0.1
    )
    losses: deque[float] = deque(maxlen=20)
    trained.train()
    for _ in range(schedule.steps):
        loss = trained(**draw(chance, schedule.batch)).loss
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

    def drawn(chance: random.Random, count: int) -> dict[str, torch.Tensor]:
        return batch(tokens, [lesson(chance) for _ in range(count)], learns_inputs=True)

    loss = optimise(fresh, drawn, schedule=schedule, seed=seed)
    fresh.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return loss


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
