"""PHATGOOSE's gates of one expert, trained with its base and its LoRA frozen (arXiv 2402.05859).

Each adapted module gives `W u + sigmoid(v·u) * ΔW u`, and v, which starts at 0, learns for which tokens the expert
helps. Routing later compares v with the tokens of any task, beside the gates of other experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from moerge.client.patience import Progress, silent
from moerge.errors import ParameterInvalid
from moerge.runtime import experts, loading, mixing
from moerge.runtime.base import Choice
from moerge.runtime.errors import NotRoutable
from moerge.tensors import strict
from moerge.tensors.files import Float32

_IGNORED = -100
_LINE_KEYS, _LINE_DEPTH = 1000, 8

Line = Mapping[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How gates are trained: `steps` of Adam at `rate`, each on `batch` lines of at most `length` tokens."""

    steps: int = 100
    rate: float = 1e-3
    batch: int = 8
    length: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """Gates by module, (d_in,) each, and the loss of every step. `still` names modules whose gate did not move."""

    gates: Mapping[str, Float32]
    losses: tuple[float, ...]
    still: tuple[str, ...]
    base_model: str


def train(folder: Path, base: str | Path, data: Path, schedule: Schedule, *, progress: Progress = silent) -> Trained:
    """Gates of the expert in `folder` for the lines of `data`, with the tokenizer that lies with `base`.

    A line is a JSON object: `input` and `output`, or `text` and `label` for a model that classifies; `text` alone is
    read on by a causal model. Raises ParameterInvalid, NotRoutable, what reading an adapter raises, OSError.
    """
    _check(schedule)
    lines = read_lines(data)
    expert = experts.read(folder.name, folder)
    model = loading.base_of(base, [expert])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch_of = _writer(model, tokenizer, schedule.length)
    model, (name,) = loading.with_experts(model, [expert], head_of=expert.name if expert.facts.saved else None)
    model.requires_grad_(requires_grad=False)
    vectors = {module: _gated(layer, name) for module, layer in loading.lora_layers(model, [expert]).items()}
    losses = []
    optimiser = torch.optim.Adam(vectors.values(), lr=schedule.rate)
    for step, chosen in enumerate(_drawn(lines, schedule)):
        loss = model(**batch_of(chosen)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress(f"training gates, loss {losses[-1]:.4f}", (step + 1) / schedule.steps)
    found = {module: vector.detach().numpy().astype(np.float32) for module, vector in vectors.items()}
    return Trained(
        gates={module: vector for module, vector in found.items() if vector.any()},
        losses=tuple(losses),
        still=tuple(module for module, vector in found.items() if not vector.any()),
        base_model=expert.config.base_model_name_or_path or "",
    )


def read_lines(path: Path) -> list[Line]:
    """The JSON objects of a file, one a line; empty lines are passed over. Raises ParameterInvalid, OSError."""
    found: list[Line] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = strict.loads(line, max_keys=_LINE_KEYS, max_depth=_LINE_DEPTH)
        except strict.Malformed as error:
            raise _wrong_line(number, str(error), "a JSON object") from error
        if not isinstance(value, dict):
            raise _wrong_line(number, type(value).__name__, "a JSON object")
        found.append({**value, "": number})
    if not found:
        raise ParameterInvalid(f"{path} holds no line to train on.", pointer="--data", met="nothing", wanted="lines",
                               remedy="Write one JSON object a line.")  # fmt: skip
    return found


def _gated(layer: Any, name: str) -> Tensor:
    """The gate of a layer, (d_in,), which from now on weighs what the adapter adds."""
    stack = mixing.stacked(layer, [name])
    vector = torch.zeros(stack.A.shape[1], requires_grad=True)

    def weigh(layer: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        tokens = arguments[0].reshape(-1, arguments[0].shape[-1]).to(stack.A.dtype)
        gate = torch.sigmoid(tokens.to(vector.dtype) @ vector)[:, None]
        flat = output.reshape(len(tokens), -1).to(stack.A.dtype)
        only = Choice(torch.zeros(gate.shape, dtype=torch.long), gate)
        added = stack.add(only, tokens, flat, bias=layer.get_base_layer().bias)
        return added.reshape(output.shape).to(output.dtype)

    layer.register_forward_hook(weigh)
    return vector


def _drawn(lines: Sequence[Line], schedule: Schedule) -> Iterator[list[Line]]:
    """`steps` batches; every line comes once before any comes again."""
    chance = np.random.default_rng(schedule.seed)
    waiting: list[int] = []
    for _ in range(schedule.steps):
        while len(waiting) < schedule.batch:
            waiting += chance.permutation(len(lines)).tolist()
        yield [lines[place] for place in waiting[: schedule.batch]]
        del waiting[: schedule.batch]


def _writer(model: Any, tokenizer: Any, length: int) -> Callable[[Sequence[Line]], Batch]:
    """What makes a batch with labels of some lines, by what the model is for."""
    name = type(model).__name__
    if model.config.is_encoder_decoder and model.can_generate():
        return lambda lines: _of_pairs(lines, tokenizer, length)
    if name.endswith("ForSequenceClassification"):
        return lambda lines: _of_labels(lines, tokenizer, length, model.config)
    if model.can_generate():
        return lambda lines: _of_prompts(lines, tokenizer, length)
    raise NotRoutable(
        f"A {name} gives no loss that gates could be trained with.", pointer="--base", met=name,
        wanted="a model that writes text or classifies it",
        remedy="Name a base model whose adapter has the task type CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS.",
    )  # fmt: skip


def _of_pairs(lines: Sequence[Line], tokenizer: Any, length: int) -> Batch:
    texts, answers = ([_text(line, field) for line in lines] for field in ("input", "output"))
    limits = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    given, wanted = tokenizer(texts, **limits), tokenizer(text_target=answers, **limits)
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, _IGNORED)
    return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}


def _of_labels(lines: Sequence[Line], tokenizer: Any, length: int, config: Any) -> Batch:
    texts = [_text(line, "text") for line in lines]
    given = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    labels = []
    for line in lines:
        label = config.label2id.get(line.get("label"), line.get("label"))
        if type(label) is not int or not 0 <= label < config.num_labels:
            raise _wrong_line(line[""], repr(line.get("label")), f"a label: 0 to {config.num_labels - 1}, or a name")
        labels.append(label)
    return {**given, "labels": torch.tensor(labels)}


def _of_prompts(lines: Sequence[Line], tokenizer: Any, length: int) -> Batch:
    """Token ids, mask and labels, padded on the right; the loss is on the outputs alone, or on the whole of a text."""
    rows = []
    for line in lines:
        is_text = "output" not in line
        start = list(tokenizer(_text(line, "text" if is_text else "input"))["input_ids"])
        end = tokenizer.eos_token_id
        if start and start[-1] == end:
            del start[-1]
        rest = [] if is_text else list(tokenizer(_text(line, "output"), add_special_tokens=False)["input_ids"])
        rest += [] if end is None else [end]
        # A prompt that is too long loses its beginning, so that there is an answer to learn from.
        start = start[: length - len(rest)] if is_text else start[max(0, len(start) + len(rest) - length) :]
        rows.append((start, rest[:length], is_text))
    width = max(len(start) + len(rest) for start, rest, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, _IGNORED), torch.zeros_like(ids)
    for row, (start, rest, is_text) in enumerate(rows):
        whole = torch.tensor(start + rest)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        learnt = 0 if is_text else len(start)
        labels[row, learnt : len(whole)] = whole[learnt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _text(line: Line, field: str) -> str:
    value = line.get(field)
    if not isinstance(value, str) or not value:
        raise _wrong_line(line[""], f"{field} {value!r:.60}", f"a text as {field}")
    return value


def _wrong_line(number: int, met: str, wanted: str) -> ParameterInvalid:
    return ParameterInvalid(
        f"Line {number} of the data is not what gates are trained on: met {met}, wanted {wanted}.",
        pointer=f"line {number}", met=met, wanted=wanted,
        remedy="A line has input and output; text and label for a model that classifies.",
    )  # fmt: skip


def _check(schedule: Schedule) -> None:
    for name in ("steps", "batch", "length", "rate"):
        if not 0 < getattr(schedule, name) < float("inf"):
            raise ParameterInvalid(f"{name} is {getattr(schedule, name)}.", pointer=name, met=getattr(schedule, name),
                                   wanted="a number above 0", remedy=f"Give {name} above 0.")  # fmt: skip
