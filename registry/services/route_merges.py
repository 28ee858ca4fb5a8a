"""Route and merge in one call: the experts that fit a text best, merged by how well they fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moerge import merging
from registry.errors import (
    ExpertNotFound,
    ExpertsIncompatible,
    Fault,
    LicenceBlocked,
    NothingToMerge,
    NotReady,
    QueryInvalid,
    RevisionNotFound,
)
from registry.models import Merge, User
from registry.selectors import Viewer
from registry.services import merges, recipes, routing

# Scores of experts that fit lie some tenths above those that do not: a tenth less is e times less weight.
TEMPERATURE = 0.1
# So many digits that the same question always gives the same recipe, whatever machine has encoded it.
DIGITS = 6
# Of the best experts some may not be mergeable with the first; three times as many leave enough as a rule.
_SPARES = 3


@dataclass(frozen=True)
class Routed:
    """What a text led to: the results that were merged, what was skipped and why, and the merge."""

    results: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    index_seq: int
    merge: Merge
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be made of the experts; `rest` holds the other fields of a recipe as `merges.register` takes them."""

    method: str
    top_k: int
    temperature: float
    rest: Mapping[str, Any]


def route_and_merge(
    *, user: User, viewer: Viewer, question: Mapping[str, Any], wish: Wish, start: bool = True
) -> Routed:
    """Register the merge of the experts that fit a text best and can be merged with each other.

    `question` holds what `routing.route` takes. Their weights are the softmax of their scores over the temperature.
    Raises NothingToMerge, QueryInvalid when the results lie on several bases, and what `routing.route` and
    `merges.register` raise.
    """
    spares = min(routing.MAX_RESULTS, _SPARES * wish.top_k)
    answer = routing.route(viewer=viewer, **question, top_k=spares)
    results = answer["results"]
    if not results:
        wanted = f"an expert with a score of {answer['min_score']:g} or more"
        fault = Fault("/text", "no such expert", wanted, "Say more of the task, or ask with a lower min_score.")
        raise NothingToMerge("No expert fits this text well enough.", faults=[fault])
    _check_bases(results[: wish.top_k])
    kept, skipped = _mergeable(results, wish, user=user)
    if not kept:
        faults = [Fault("/text", item["expert"], "an expert that can be merged", item["reason"]) for item in skipped]
        raise NothingToMerge("No expert that fits this text can be merged.", faults=faults)
    merge, is_new = merges.register(user=user, body=_body(kept, wish), start=start)
    return Routed(kept, skipped, answer["index_seq"], merge, is_new)


def weights(scores: Sequence[float], temperature: float) -> list[float]:
    """Softmax of scores over a temperature, rounded."""
    highest = max(scores)
    powers = [math.exp((score - highest) / temperature) for score in scores]
    return [round(power / math.fsum(powers), DIGITS) for power in powers]


def _check_bases(results: Sequence[Mapping[str, Any]]) -> None:
    bases = sorted({result["base_model"] for result in results})
    if len(bases) > 1:
        wanted = f"one of {', '.join(bases)}"
        fault = Fault("/base_model", None, wanted, "Name the base model that the merge is for.")
        raise QueryInvalid(f"Experts of {len(bases)} base models fit this text.", faults=[fault])


def _mergeable(
    results: Sequence[dict[str, Any]], wish: Wish, *, user: User
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The best results that can be merged with each other, and those that came before the last one and cannot."""
    spec = merging.catalogue().get(wish.method)
    most = min(wish.top_k, (spec and spec.most_experts) or wish.top_k)
    kept: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for result in results:
        if len(kept) == most:
            break
        try:
            recipes.resolve(viewer=user, body=_body([*kept, result], wish), is_asked=False)
        except (ExpertsIncompatible, LicenceBlocked, NotReady, ExpertNotFound, RevisionNotFound) as error:
            skipped.append({"expert": result["expert"], "revision": result["revision"], "reason": error.detail})
        else:
            kept.append(result)
    return kept, skipped


def _body(results: Sequence[Mapping[str, Any]], wish: Wish) -> dict[str, Any]:
    """The recipe of some results, as somebody would have written it."""
    shares = weights([result["score"] for result in results], wish.temperature)
    return {
        **wish.rest,
        "method": wish.method,
        "base_model": results[0]["base_model"],
        "experts": [
            {"expert": result["expert"], "revision": result["revision"], "weight": share}
            for result, share in zip(results, shares, strict=True)
        ],
    }
