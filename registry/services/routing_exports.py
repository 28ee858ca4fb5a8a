"""The routable experts of one base model for programs that route by themselves.

`vllm_sr` writes the configuration of vLLM Semantic Router, `card_lines` the cards as JSON lines.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from moerge.routing import cards
from moerge.routing.cards import Card
from registry import selectors
from registry.errors import Fault, NotFound, RequestInvalid
from registry.models import BaseModel
from registry.selectors import Search, Viewer
from registry.services import bases, routing

MOST_EXPERTS = 1000
# What its own examples use. Its encoder is another one, so the hub's thresholds mean nothing there.
VLLM_SR_THRESHOLD = 0.72
# The contract "v0.3" of vllm-project/semantic-router, as release v0.3.0 (commit 9afc5a4) checks it.
VLLM_SR_VERSION = "v0.3"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+")
# Later versions replace $NAME and ${NAME} in any text by the environment's value; a dollar before a space stays one.
_DOLLAR = re.compile(r"\$(?=\S)")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The cards of what a viewer may see on one base model, in the order of their names."""

    base: BaseModel
    cards: tuple[Card, ...]


def of(viewer: Viewer, wanted: Search) -> Export:
    """What is exported: everything routable on `wanted.base_model` that passes owner, tags and licence.

    Raises BaseUnknown, NotFound where nothing is left, RequestInvalid for more than one file should hold.
    """
    base = bases.resolve(wanted.base_model, pointer="?base_model")
    visible = selectors.search(viewer, replace(wanted, base_model="", text=""))
    heads = selectors.routable().filter(base_model=base, expert__in=visible.order_by().values("pk"))
    rows = heads.select_related("expert__namespace", "base_model").order_by("expert__namespace__name", "expert__name")
    found = [routing.card_of(row.expert, row) for row in rows[: MOST_EXPERTS + 1] if row.expert is not None]
    if not found:
        raise NotFound(
            f"No expert on {base.name} is ready to be routed.",
            faults=[Fault("?base_model", base.name, "a base model with experts", "Take a filter away, or upload one.")],
        )
    if len(found) > MOST_EXPERTS:
        raise RequestInvalid(
            "These are too many experts for one file.",
            faults=[Fault("?base_model", f"more than {MOST_EXPERTS}", f"at most {MOST_EXPERTS} experts",
                          "Narrow it by owner, tag or licence.")],
        )  # fmt: skip
    return Export(base=base, cards=tuple(found))


def card_lines(export: Export) -> Iterator[str]:
    """The cards as `bin/bench routing --experts` reads them."""
    for card in export.cards:
        record = {
            "id": card.expert,
            "suite": card.expert.partition("/")[0],
            "name": card.name,
            "description": card.description,
            "examples": list(cards.used_examples(card)),
            "tags": list(card.tags),
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


def vllm_sr(export: Export, *, threshold: float = VLLM_SR_THRESHOLD) -> str:
    """A configuration for vLLM Semantic Router, YAML.

    Each expert is a LoRA of the base, a signal that fires when the nearest of its texts is near enough, and a decision
    that sends such requests to it. All decisions have one priority, so the nearest wins; requests that are near to
    none go to the base. Names of LoRAs are those of the experts here.
    """
    base = _plain(export.base.name)
    names = [_plain(card.expert) for card in export.cards]
    config: dict[str, Any] = {
        "version": VLLM_SR_VERSION,
        "listeners": [{"name": "http", "address": "0.0.0.0", "port": 8899, "timeout": "300s"}],  # noqa: S104 - its own default
        "providers": {
            "defaults": {"default_model": base},
            "models": [
                {
                    "name": base,
                    "provider_model_id": base,
                    "backend_refs": [{"name": "vllm", "endpoint": "127.0.0.1:8000", "protocol": "http", "weight": 100}],
                }
            ],
        },
        "routing": {
            "modelCards": [
                {
                    "name": base,
                    "loras": [
                        {"name": name, "description": _plain(card.description)}
                        for name, card in zip(names, export.cards, strict=True)
                    ],
                }
            ],
            "signals": {
                "embeddings": [
                    {
                        "name": name,
                        "threshold": threshold,
                        "aggregation_method": "max",
                        "candidates": [_plain(text) for text in cards.texts(card)],
                    }
                    for name, card in zip(names, export.cards, strict=True)
                ]
            },
            "decisions": [
                {
                    "name": name,
                    "description": _plain(card.description) or name,
                    "priority": 100,
                    "rules": {"operator": "OR", "conditions": [{"type": "embedding", "name": name}]},
                    "modelRefs": [{"model": base, "lora_name": name, "use_reasoning": False}],
                }
                for name, card in zip(names, export.cards, strict=True)
            ],
        },
    }
    head = (
        f"# vLLM Semantic Router, configuration {VLLM_SR_VERSION}: {len(names)} experts as LoRAs of one base model.\n"
        "# Before use: put the address of your vLLM under backend_refs, serve each expert with --lora-modules under\n"
        "# its name, and choose thresholds for the encoder that your router uses.\n"
    )
    return head + yaml.dump(_quoted(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


class _Text(str):
    """A value that is written in double quotes, so that no reader of YAML takes it for a number, a date or a null."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _quoted(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_quoted(inner) for inner in value]
    return _Text(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    """One line without control characters, in which nothing is replaced by the reader's environment."""
    return _DOLLAR.sub("$ ", _CONTROLS.sub(" ", text)).strip()
