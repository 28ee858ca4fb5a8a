"""The methods compared: each takes inputs and gives the answers of one way to use base and experts.

Experts act through stock PEFT where one of them answers alone, through `moerge.merging` where they are merged, and
through `moerge.runtime` where every token is routed. The oracle knows which expert each word belongs to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch

from examples.token_routing import base, experts, tasks
from moerge.embedding import encoder
from moerge.embedding.encoder import Encoder
from moerge.merging import recipe, run
from moerge.routing.base import Query
from moerge.routing.cards import entry, texts
from moerge.routing.state import Hit, Ranking, State
from moerge.runtime import RoutedModel
from moerge.tensors import adapters

BATCH = 100
MOST_TOKENS = 2 * tasks.HALF + 2  # The longest answer, its end, and one token too many.
Answers = list[str]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where the trained things of one seed lie."""

    base: Path
    experts: Mapping[str, Path]
    tokens: Any


def encoded(tokens: Any, items: Sequence[tasks.Item]) -> dict[str, torch.Tensor]:
    found = tokens([item.text for item in items], padding=True, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def answers(model: Any, tokens: Any, items: Sequence[tasks.Item], **more: Any) -> Answers:
    """What a model generates, greedily, for one batch of inputs."""
    given = encoded(tokens, items)
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False, **more)
    return [str(text) for text in tokens.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)]


def merged(place: Place, method: str, parameters: Mapping[str, Any], out: Path) -> str:
    """Writes one adapter made of all experts by the library, each of weight 1; how much of the merge its rank keeps."""
    brought, named = {}, []
    for name, folder in place.experts.items():
        config = adapters.parse_config((folder / "adapter_config.json").read_bytes())
        adapter = adapters.load(config, folder / "adapter_model.safetensors")
        brought[adapter.digest] = adapter
        named.append({"expert": f"demo/{name}", "revision": "1", "digest": adapter.digest, "weight": 1.0})
    asked = {"method": method, "parameters": dict(parameters), "experts": named, "output": {"kind": "lora"}}
    told = run.merge(recipe.parse(asked), brought, out)
    return f"rank {told.rank}, {told.energy_kept:.4f} of the energy"


def with_adapter(place: Place, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base.load(place.base), folder).eval()


def together(place: Place) -> Any:
    """A stock PeftModel with every expert under its task's name, chosen for each input by `adapter_names`."""
    (first, folder), *others = place.experts.items()
    model = peft.PeftModel.from_pretrained(base.load(place.base), folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    return model.eval()


def routed(place: Place, strategy: str, **settings: Any) -> RoutedModel:
    """The library's routed model, by default with the best two experts of each token."""
    return RoutedModel.from_folders(base.load(place.base), place.experts, strategy=strategy, **settings)


class Retrieval:
    """The hub's ranking over the experts' cards, with the packaged encoder."""

    @cached_property
    def _loaded(self) -> tuple[Encoder, State]:
        # Loading takes seconds, and where all results are there nothing is asked.
        loaded = encoder.load()
        cards = [experts.card(task, number=number) for number, task in enumerate(tasks.TASKS, start=1)]
        entries = [entry(card, loaded.encode(texts(card))) for card in cards]
        return loaded, State(encoder_id=loaded.id, dimension=loaded.dimension).changed(seq=1, put=entries)

    def best(self, items: Sequence[tasks.Item]) -> list[str]:
        """The expert that the default strategy puts first, for each input."""
        return [_name(ranking.hits[0]) for ranking in self._rankings(items)]

    def cosines(self, items: Sequence[tasks.Item]) -> list[dict[str, float]]:
        """For each input its cosine with every expert's description: GLIDER's global half."""
        return [{_name(hit): hit.parts["s_desc"] for hit in ranking.hits} for ranking in self._rankings(items)]

    def _rankings(self, items: Sequence[tasks.Item]) -> list[Ranking]:
        loaded, state = self._loaded
        vectors = loaded.encode([item.text for item in items])
        return [
            state.rank(Query(text=item.text, vector=vector), base_model=base.NAME)
            for item, vector in zip(items, vectors, strict=True)
        ]


def _name(hit: Hit) -> str:
    return hit.expert.removeprefix("demo/")


def oracle(model: Any, tokens: Any, items: Sequence[tasks.Item]) -> Answers:
    """Every word is read, and its answer written, by the expert of the word's task.

    `model` is `together`'s. Tokens are read one after the other with the cache, each row by the expert in charge.
    """
    given = encoded(tokens, items)
    count, width = given["input_ids"].shape
    waits = (given["attention_mask"] == 0).sum(dim=1).tolist()  # Padding on the left of each row.
    charges = [tasks.in_charge(item) for item in items]
    ids, mask, cache = given["input_ids"][:, :1], given["attention_mask"][:, :1], None
    for turn in range(width + MOST_TOKENS - 1):
        places = [min(max(turn - wait, 0), len(names) - 1) for wait, names in zip(waits, charges, strict=True)]
        with torch.no_grad():
            told = model(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=(mask.sum(dim=1, keepdim=True) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                adapter_names=[names[place] for names, place in zip(charges, places, strict=True)],
            )
        cache = told.past_key_values
        is_read = turn + 1 < width
        following = given["input_ids"][:, turn + 1] if is_read else told.logits[:, -1].argmax(dim=-1)
        more = given["attention_mask"][:, turn + 1] if is_read else torch.ones(count, dtype=torch.long)
        ids, mask = torch.cat([ids, following[:, None]], dim=1), torch.cat([mask, more[:, None]], dim=1)
    made = ids[:, width:]
    ended = (made == tokens.eos_token_id).cumsum(dim=1) > 0
    return [
        str(text) for text in tokens.batch_decode(made.where(~ended, tokens.pad_token_id), skip_special_tokens=True)
    ]


def watched(model: RoutedModel, tokens: Any, items: Sequence[tasks.Item]) -> Weights:
    """(inputs, length, experts): each expert's weight at each token of inputs and right answers, the mean of modules.

    The experts are in the order of `model.experts`. Shorter inputs are padded on the right.
    """
    given = base.batch(tokens, items)
    with model.watching() as record:
        model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    found = torch.stack([passes[0].double() for passes in record.values()]).mean(dim=0)
    return np.asarray(found.numpy())


def right_share(weights: Weights, names: Sequence[str], items: Sequence[tasks.Item]) -> float:
    """The share of the weight that goes to the expert in charge of each token; `names` are the experts'."""
    shares = [
        weights[row, place, names.index(name)]
        for row, item in enumerate(items)
        for place, name in enumerate(tasks.in_charge(item))
    ]
    return float(np.mean(shares))


def use_by_half(weights: Weights, names: Sequence[str], items: Sequence[tasks.Item]) -> dict[str, dict[str, float]]:
    """{segment: shares of the first half's expert and the second half's} for inputs of two halves."""
    told: dict[str, dict[str, float]] = {}
    for turn, segment in enumerate(tasks.SEGMENTS):
        here = weights[:, turn * tasks.HALF : (turn + 1) * tasks.HALF].mean(axis=1)
        told[segment] = {
            half: float(np.mean([here[row, names.index(item.tasks[place])] for row, item in enumerate(items)]))
            for half, place in (("first", 0), ("second", -1))
        }
    return told


def batched(items: Sequence[tasks.Item], answer: Callable[[Sequence[tasks.Item]], Answers]) -> Answers:
    return [text for start in range(0, len(items), BATCH) for text in answer(items[start : start + BATCH])]
