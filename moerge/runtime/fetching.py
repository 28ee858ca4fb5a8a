"""Experts of a hub with their routing pack, and the hub's scores of them for a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.client import Hub, environment, pulling, records
from moerge.client.errors import AnswerInvalid
from moerge.client.records import Snapshot
from moerge.client.references import Reference
from moerge.errors import ExpertsIncompatible, ParameterInvalid
from moerge.routing import packs
from moerge.routing.packs import Pack
from moerge.runtime import experts as folders_of
from moerge.runtime.experts import Expert

# What one request may ask.
_TEXTS, _RESULTS = 32, 50
# The strategies of the hub that score for those of a model; the others take the hub's usual one.
_GLIDER = "glider"


@dataclass(frozen=True)
class Source:
    """Where the experts came from; a key is kept as long as the model, and stays out of what is shown of it."""

    endpoint: str | None
    token: str | None
    base_model: str = ""

    def hub(self) -> Hub:
        return Hub(self.endpoint, self.token)

    def __repr__(self) -> str:
        return f"Source({self.endpoint!r}, base_model={self.base_model!r})"


@dataclass(frozen=True)
class Fetched:
    """Experts in the caller's order, their base model's name on the hub, and the pack where one was wanted."""

    experts: tuple[Expert, ...]
    base_model: str
    pack: Pack | None


def fetch(
    hub: Hub, names: Sequence[str], *, kind: str | None, compressed: bool, folder: Path | None, base: str | None
) -> Fetched:
    """Pull each expert, named as `owner/name[@revision]`, and ask for the pack of these revisions.

    `base` is what the caller calls the base model, None where that is no name. Raises ExpertsIncompatible where the
    experts have several base models or another one, ClientError, what reading an adapter raises.
    """
    references = [Reference.parse(name) for name in names]
    if not references or len(set(names)) < len(names):
        raise ParameterInvalid("Experts are named once each.", pointer="experts", met=", ".join(names) or "none",
                               wanted="one or more", remedy="Name each expert once.")  # fmt: skip
    snapshots = [hub.snapshot(reference) for reference in references]
    base_model = _one_base(
        {str(one): _base_of(hub, one, snapshot) for one, snapshot in zip(references, snapshots, strict=True)}
    )
    if base not in {None, base_model} and _known_as(hub, str(base)) != base_model:
        raise ExpertsIncompatible(
            f"The experts belong to {base_model}, not to {base}.", pointer="base", met=base, wanted=base_model,
            remedy=f"Load {base_model}, or hand in the model itself where it is the same under another name.",
        )  # fmt: skip
    found = []
    for name, reference, snapshot in zip(names, references, snapshots, strict=True):
        form = "decoded" if compressed else "experts"
        place = (folder or environment.cache() / form) / reference.owner / reference.name / snapshot.commit
        pulling.pull(hub, reference, place, compressed=compressed, snapshot=snapshot)
        found.append(folders_of.read(name, place))
    pack = None
    if kind is not None:
        pinned = [f"{one.full_name}@{one.commit}" for one in snapshots]
        data = hub.post_for_file(
            "/api/v1/routing/packs", {"base_model": base_model, "experts": pinned, "kinds": [kind]}
        )
        pack = packs.read(data)
        _check_pack(pack, pinned, kind)
    return Fetched(tuple(found), base_model, pack)


def scores(
    hub: Hub, texts: Sequence[str], experts: Sequence[str], base_model: str, *, strategy: str
) -> list[dict[str, float]]:
    """What the hub makes of each text for these experts: {expert: score}, without those that it does not name."""
    found: list[dict[str, float]] = [{} for _ in texts]
    for start in range(0, len(texts), _TEXTS):
        part = list(texts[start : start + _TEXTS])
        for first in range(0, len(experts), _RESULTS):
            some = experts[first : first + _RESULTS]
            for place, told in enumerate(_scored(hub, part, some, base_model, strategy=strategy), start):
                found[place].update(told)
    return found


def _scored(
    hub: Hub, texts: Sequence[str], experts: Sequence[str], base_model: str, *, strategy: str
) -> list[dict[str, float]]:
    """One request's worth."""
    by_name = {name.partition("@")[0].casefold(): name for name in experts}
    asked: dict[str, Any] = {
        "texts": texts, "base_model": base_model, "top_k": len(experts), "min_score": 0,
        "filters": {"experts": [name.partition("@")[0] for name in experts]},
    }  # fmt: skip
    if strategy == _GLIDER:
        asked["strategy"] = _GLIDER
    answers = records.mapping(hub.post("/api/v1/route", asked)[1], "the answer").get("answers")
    if not isinstance(answers, list) or len(answers) != len(texts):
        raise _odd("answers", answers, f"{len(texts)} answers")
    found = []
    for one in answers:
        rows = [records.mapping(row, "a result") for row in records.mapping(one, "an answer").get("results", [])]
        found.append(dict(_score(row, by_name) for row in rows))
    return found


def _score(row: Mapping[str, Any], by_name: Mapping[str, str]) -> tuple[str, float]:
    name, score = by_name.get(str(row.get("expert")).casefold()), row.get("score")
    if name is None or isinstance(score, bool) or not isinstance(score, int | float):
        raise _odd("result", row, f"a score of one of {', '.join(by_name)}")
    return name, float(score)


def _base_of(hub: Hub, reference: Reference, snapshot: Snapshot) -> str:
    """The base model of an expert; what the hub derives of it has no record that tells."""
    return snapshot.base_model or hub.snapshot(Reference(reference.owner, reference.name)).base_model


def _one_base(bases: dict[str, str]) -> str:
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name}: {base or 'unknown'}" for name, base in bases.items())
        raise ExpertsIncompatible(
            f"The experts belong to several base models: {told}.", pointer="experts", met=told, wanted="one base model",
            remedy="Take experts of one base model.",
        )  # fmt: skip
    return next(iter(bases.values()))


def _known_as(hub: Hub, base: str) -> str:
    """The hub's own name of a base model, by a name or an alias; empty where no expert belongs to it."""
    page = records.mapping(
        hub.json("/api/v1/experts", params={"base_model": base, "limit": "1"}), "the list of experts"
    )
    items = page.get("items")
    return (
        str(records.mapping(items[0], "an expert").get("base_model") or "") if isinstance(items, list) and items else ""
    )


def _check_pack(pack: Pack, wanted: Sequence[str], kind: str) -> None:
    """The pack is of the revisions asked for, in their order."""
    met = [f"{one.expert}@{one.revision}" for one in pack.members]
    # Names of experts are the same in capitals and small letters.
    if [one.casefold() for one in met] != [one.casefold() for one in wanted] or kind not in pack.kinds:
        raise _odd("pack", f"{met}, {list(pack.kinds)}", f"{list(wanted)} with {kind}")


def _odd(what: str, met: object, wanted: str) -> AnswerInvalid:
    return AnswerInvalid(
        f"The hub's answer has an odd {what}.", pointer=what, met=str(met)[:200], wanted=wanted,
        remedy="Check that the endpoint is the address of a hub of this version.",
    )  # fmt: skip
