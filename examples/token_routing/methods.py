"""The methods compared: each takes inputs and gives the answers of one way to use base and experts.

Experts act through stock PEFT where one of them answers alone, through `moerge.merging` where they are merged, and
through `moerge.runtime` where every token is routed. The oracle knows which expert each part belongs to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
MOST_TOKENS = 20  # The longest answer, two words of six letters with es and a semicolon, has 18.
Answers = list[str]


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
        cards = [experts.card(task, number=number) for number, task in enumerate(tasks.EXPERTS, start=1)]
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
    """Every part is read, and its piece of the answer written, by the expert of the part's task.

    `model` is `together`'s. Parts are read one after the other with the cache, each padded on the left.
    """
    mark = tokens.convert_tokens_to_ids(";")
    pieces = torch.zeros(len(items), dtype=torch.long)
    reader = _Reader(model, [item.tasks for item in items])
    count = max(len(item.tasks) for item in items)
    split = [_parts(tokens, item) for item in items]
    for part in range(count):
        reader.read(_padded([row[part] if part < len(row) else [] for row in split], tokens.pad_token_id), part)
    ids = torch.full((len(items), 1), tokens.convert_tokens_to_ids("="))
    made = []
    done = torch.zeros(len(items), dtype=torch.bool)
    for _ in range(MOST_TOKENS):
        chosen = reader.read((ids, torch.ones_like(ids)), pieces)
        made.append(torch.where(done, tokens.pad_token_id, chosen))
        done |= chosen == tokens.eos_token_id
        if done.all():
            break
        # The semicolon is read by the next part's expert, which is to write after it.
        pieces += chosen == mark
        ids = chosen[:, None]
    return [str(text) for text in tokens.batch_decode(torch.stack(made, dim=1), skip_special_tokens=True)]


class _Reader:
    """Reads blocks of tokens into one cache, each row by the expert of the part it is at."""

    def __init__(self, model: Any, names: Sequence[Sequence[str]]) -> None:
        self._model = model
        self._names = names
        self._cache: Any = None
        self._mask = torch.zeros((len(names), 0), dtype=torch.long)

    def read(self, block: tuple[torch.Tensor, torch.Tensor], parts: int | torch.Tensor) -> torch.Tensor:
        """The likeliest next token of each row."""
        ids, mask = block
        places = (self._mask.sum(dim=1, keepdim=True) + mask.cumsum(dim=1) - 1).clamp(min=0)
        self._mask = torch.cat([self._mask, mask], dim=1)
        numbers = [parts] * len(ids) if isinstance(parts, int) else parts.tolist()
        chosen = [names[min(number, len(names) - 1)] for names, number in zip(self._names, numbers, strict=True)]
        with torch.no_grad():
            given = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=places,
                past_key_values=self._cache,
                use_cache=True,
                adapter_names=chosen,
            )
        self._cache = given.past_key_values
        return torch.as_tensor(given.logits[:, -1].argmax(dim=-1))


def _parts(tokens: Any, item: tasks.Item) -> list[list[int]]:
    """The token ids of each part, a semicolon at the end of all but the last; without the sign of equality."""
    parts = item.text.removesuffix(" =").split("; ")
    return [tokens(part + ";" * (number < len(parts) - 1))["input_ids"] for number, part in enumerate(parts)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def use_by_half(model: RoutedModel, tokens: Any, items: Sequence[tasks.Item]) -> dict[str, dict[str, float]]:
    """{segment: shares of the first half's expert, the second half's, and all others}, over all modules.

    `items` have two parts; the model reads them with their right answers.
    """
    given = base.batch(tokens, items)
    weights = _weights(model, given)
    where = np.array([tasks.segments(tokens.convert_ids_to_tokens(row)) for row in given["input_ids"]])
    number = {name: position for position, name in enumerate(model.experts)}
    owners = np.array([[number[name] for name in item.tasks] for item in items])
    told = {}
    for position, segment in enumerate(tasks.SEGMENTS):
        rows, columns = np.nonzero(where == position)
        here = weights[rows, columns]
        first, second = (float(here[np.arange(len(here)), owners[rows, part]].mean()) for part in range(2))
        told[segment] = {"first": first, "second": second, "others": float(here.sum(axis=1).mean()) - first - second}
    return told


def share_of(model: RoutedModel, tokens: Any, items: Sequence[tasks.Item], name: str) -> float:
    """The share of the weight that the named expert has on these inputs with their right answers, over all modules."""
    model.reset_usage()
    given = base.batch(tokens, items)
    model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    shares = [used[name] for used in model.usage().values()]
    return sum(shares) / len(shares)


def _weights(model: RoutedModel, given: Mapping[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """(inputs, length, experts): the weight of each expert at each token, the mean of all modules."""
    with model.watching() as record:
        model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    found = torch.stack([passes[0].float() for passes in record.values()]).mean(dim=0)
    return np.asarray(found.numpy())


def batched(items: Sequence[tasks.Item], answer: Callable[[Sequence[tasks.Item]], Answers]) -> Answers:
    return [text for start in range(0, len(items), BATCH) for text in answer(items[start : start + BATCH])]
