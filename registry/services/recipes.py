"""Recipes as callers write them: every expert pinned to a revision that the caller may see, and the whole judged."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.utils import timezone

from moerge import merging
from moerge.errors import ExpertsIncompatible as LibraryIncompatible
from moerge.errors import MoergeError
from moerge.merging import recipe as recipes
from moerge.merging.recipe import Recipe
from moerge.tensors import adapters
from registry import selectors
from registry.checks import files, licences, names
from registry.checks.licences import Verdict
from registry.errors import (
    ExpertNotFound,
    ExpertsIncompatible,
    Fault,
    LicenceBlocked,
    LicenceUnacknowledged,
    NotReady,
    RecipeInvalid,
    RevisionNotFound,
)
from registry.models import BaseModel, File, Merge, Revision, User
from registry.selectors import Viewer
from registry.services import bases, judging, kinship
from registry.services.judging import Judgement
from registry.services.parents import Parent

ID_LENGTH = 20
STATISTICS = "stats.safetensors"
MOST_LICENCE = 64
_UNSTORABLE = re.compile(r"[\0\uD800-\uDFFF]")


@dataclass(frozen=True)
class Terms:
    """What a request says beside the recipe: that somebody answers for unknown licences, and a label for the result."""

    acknowledge_licences: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A recipe whose experts are pinned and judged: what the library parsed, and the revision behind each expert.

    `parents` are in the order of the recipe's experts. `licence` is what Merge.licence keeps.
    """

    recipe: Recipe
    parents: tuple[Revision, ...]
    licence: dict[str, Any]
    judgement: Judgement
    members: tuple[Parent, ...]

    @property
    def merge_id(self) -> str:
        return self.recipe.digest[:ID_LENGTH]

    @property
    def commit(self) -> str:
        """The 40-hex commit of the result, known before the computation: same recipe and parents, same commit.

        The canonical recipe holds the version of the method, so a method that changes gives other commits.
        """
        parts = [self.recipe.canonical().decode(), *(parent.commit for parent in self.parents)]
        return hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()


def check(*, viewer: Viewer, body: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a recipe can be carried out and what it would give, from rows alone, before any work.

    Raises as `register` does; only an acknowledgement that is lacking is told instead. A signed-in caller's question
    has the kinship of those experts measured that were never compared.
    """
    resolved = resolve(viewer=viewer, body=body, is_asked=False)
    recipe, cost = resolved.recipe, resolved.judgement.cost
    known = Merge.objects.visible_to(viewer).filter(recipe_id=recipe.digest).first()
    return {
        "ok": True,
        "digest": recipe.digest,
        "repo": f"{selectors.MERGES}/{resolved.merge_id}",
        "commit": resolved.commit,
        "state": known.state if known else None,
        "recipe": recipe.to_dict(),
        "warnings": [*resolved.judgement.warnings, *(item["detail"] for item in resolved.licence["reasons"])],
        "experts": [_of_expert(resolved, place) for place in range(len(resolved.members))],
        "output": {
            "kind": recipe.output.kind,
            "rank": cost.rank if cost else None,
            "bytes": cost.written_bytes if cost else None,
        },
        "cost": cost
        and {
            "memory_bytes": cost.memory_bytes,
            "written_bytes": cost.written_bytes,
            "cpu_seconds": float(f"{cost.seconds:.3g}"),
        },
        "licence": {
            **resolved.licence,
            "acknowledgement_needed": _lacks_acknowledgement(resolved.licence),
        },
        "kinship": kinship.between(
            [
                kinship.Member(
                    parent.name,
                    parent.digest,
                    parent.revision,
                    sum(module.shape[0] * max(1, module.shape[1]) for module in (parent.modules or {}).values()),
                )
                for parent in resolved.members
            ],
            viewer=viewer,
        ),
    }


def _of_expert(resolved: Resolved, place: int) -> dict[str, Any]:
    """What is known of one expert of a recipe, in the order of the request."""
    parent = resolved.members[place]
    missing = resolved.judgement.missing.get(parent.position)
    return {
        "expert": parent.name,
        "revision": parent.revision.commit,
        "kind": parent.kind,
        "family": parent.family,
        "rank": parent.revision.rank,
        "modules": None if parent.modules is None else len(parent.modules),
        "missing_count": missing.count if missing else 0,
        "missing": list(missing.names) if missing else [],
        "licence": parent.licence or None,
    }


def resolve(*, viewer: Viewer, body: Mapping[str, Any], is_asked: bool = True) -> Resolved:
    """Pin every expert of a recipe to a revision that the viewer may see, then judge the whole.

    `is_asked`: the merge is asked for, not only looked at, so that an acknowledgement must be there where the hub
    wants one. Raises RecipeInvalid, BaseUnknown, ExpertNotFound, RevisionNotFound, NotReady, ExpertsIncompatible,
    LicenceBlocked, LicenceUnacknowledged.
    """
    _check_text(body)
    filled = dict(body)
    terms = _terms(filled)
    if filled.get("base_model") is not None and isinstance(filled["base_model"], str):
        filled["base_model"] = bases.resolve(filled["base_model"], pointer="/base_model").name
    pinned = _pin_all(filled, viewer=viewer)
    if filled.get("base_model") is None and pinned and pinned[0].revision.base_model:
        # Whether a request names the base or leaves it to its experts makes no other merge.
        filled["base_model"] = pinned[0].revision.base_model.name
    try:
        recipe = recipes.parse(filled)
    except LibraryIncompatible as error:
        raise ExpertsIncompatible.of(error) from error
    except MoergeError as error:
        raise RecipeInvalid.of(error) from error
    base = pinned[0].revision.base_model
    assert base is not None, "a revision that is ready has a base"
    judgement = judging.judge(recipe, pinned, base=base)
    licence = _licence(pinned, base, terms, viewer=viewer)
    if is_asked and _lacks_acknowledgement(licence):
        raise LicenceUnacknowledged(
            "Not every licence of these experts is known, and this hub wants somebody to answer for that.",
            faults=[Fault("/acknowledge_licences", None, True, item["detail"]) for item in licence["reasons"]],
        )
    by_content = {parent.digest + parent.revision.commit: parent for parent in pinned}
    parents = tuple(by_content[expert.digest + expert.revision].revision for expert in judgement.recipe.experts)
    return Resolved(judgement.recipe, parents, licence, judgement, tuple(pinned))


def _check_text(body: Mapping[str, Any]) -> None:
    """Raise RecipeInvalid for text that no row can hold: with NUL, or with half of a surrogate pair."""
    waiting: list[tuple[str, object]] = [("", body)]
    while waiting:
        pointer, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(pointer, key) for key in value] + [(f"{pointer}/{key}", part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{pointer}/{place}", part) for place, part in enumerate(value)]
        elif isinstance(value, str) and (found := _UNSTORABLE.search(value)):
            fault = Fault(pointer, f"U+{ord(found[0]):04X}", "text without it", "Take that character out.")
            raise RecipeInvalid("The recipe holds a character that no text may have.", faults=[fault])


def _terms(filled: dict[str, Any]) -> Terms:
    """Take out of a request what is no part of the recipe."""
    acknowledged = filled.pop("acknowledge_licences", False)
    licence = filled.pop("licence", None)
    if not isinstance(acknowledged, bool):
        fault = Fault("/acknowledge_licences", str(acknowledged)[:80], "true or false", "Send true to answer for them.")
        raise RecipeInvalid("acknowledge_licences is no truth value.", faults=[fault])
    if licence is not None and (not isinstance(licence, str) or not 0 < len(licence.strip()) <= MOST_LICENCE):
        fault = Fault("/licence", str(licence)[:80], f"a text of 1 to {MOST_LICENCE} characters", "Leave it out.")
        raise RecipeInvalid("The licence of the result is no text.", faults=[fault])
    return Terms(acknowledged, licence)


# Licences


def _licence(parents: list[Parent], base: BaseModel, terms: Terms, *, viewer: Viewer) -> dict[str, Any]:
    """What the licences say together, and who answered for the unknown ones. Raises LicenceBlocked."""
    named = {parent.name: parent for parent in parents}
    verdict = licences.verdict(
        [(parent.name, parent.licence) for parent in named.values()], (base.name, base.licence), terms.licence
    )
    if verdict.verdict == licences.BLOCK:
        raise _blocked(verdict, named, base)
    acknowledged = None
    if terms.acknowledge_licences and isinstance(viewer, User):
        acknowledged = {"by": viewer.username, "at": timezone.now().isoformat(timespec="seconds")}
    return {**verdict.to_dict(), "acknowledged": acknowledged}


def _blocked(verdict: Verdict, named: Mapping[str, Parent], base: BaseModel) -> LicenceBlocked:
    reasons = [reason for reason in verdict.reasons if reason.verdict == licences.BLOCK]
    stated = {name: parent.licence for name, parent in named.items()} | {base.name: base.licence}
    faults = [
        Fault(
            f"{named[name].pointer}/expert" if name in named else "/base_model",
            f"{name}: {stated[name] or 'no licence'}",
            "licences that may be joined",
            f"{reason.detail} Leave one out.",
            reason.rule,
        )
        for reason in reasons
        for name in reason.parents
    ]
    return LicenceBlocked(reasons[0].detail, faults=faults)


def _lacks_acknowledgement(licence: Mapping[str, Any]) -> bool:
    # Any other value than that of the default is taken for the strict one.
    is_wanted = settings.HUB_MERGE_UNKNOWN_LICENCES != licences.WARN
    return is_wanted and licence["verdict"] == licences.WARN and licence["acknowledged"] is None


# Experts


def _pin_all(filled: dict[str, Any], *, viewer: Viewer) -> list[Parent]:
    """Replace the experts of a request by pinned ones, and give what stands behind each.

    What is not even a list, or a name, is left to the library, which refuses it by field.
    """
    items = filled.get("experts")
    if not isinstance(items, list) or not items:
        return []
    most = settings.HUB_MERGE_MAX_EXPERTS
    if len(items) > most:
        fault = Fault("/experts", len(items), f"1 to {most}", "Merge some first, or fewer.")
        raise RecipeInvalid("A recipe has too many experts.", faults=[fault])
    # Without any weights every expert counts alike.
    alike = None if any(isinstance(item, dict) and "weight" in item for item in items) else 1 / len(items)
    spec = merging.catalogue().get(str(filled.get("method")))
    found: list[Parent] = []
    pinned = []
    for position, item in enumerate(items):
        parent = _parent(item, position, viewer=viewer)
        if parent is None:
            pinned.append(item)
            continue
        found.append(parent)
        pinned.append(_pinned(item, parent, alike=alike, needs=spec.needs if spec else ()))
    filled["experts"] = pinned
    output = filled.get("output", {})
    if isinstance(output, dict) and "kind" not in output and found and all(one.family == "ia3" for one in found):
        filled["output"] = {"kind": "ia3", **output}
    return found


def _parent(item: object, position: int, *, viewer: Viewer) -> Parent | None:
    """What stands behind one expert of the request; None for what is not even a name."""
    if not isinstance(item, dict) or not isinstance(item.get("expert"), str):
        return None
    pointer = f"/experts/{position}"
    unknown = sorted(str(name) for name in set(item) - {"expert", "revision", "weight"})
    if unknown:
        fault = Fault(f"{pointer}/{unknown[0]}", unknown[0], "expert, revision, weight", "Leave it out.")
        raise RecipeInvalid(f"There is no field {unknown[0]!r} here.", faults=[fault])
    revision = expert_revision(item["expert"], item.get("revision"), viewer=viewer, pointer=pointer)
    return Parent(position, content_digest(revision), revision)


def _pinned(item: Mapping[str, Any], parent: Parent, *, alike: float | None, needs: tuple[str, ...]) -> dict[str, Any]:
    """One expert of the request with revision, digest, base, weight and statistics filled in."""
    assert parent.revision.base_model is not None
    pinned: dict[str, Any] = {
        "expert": parent.name,
        "revision": parent.revision.commit,
        "digest": parent.digest,
        "base_model": parent.revision.base_model.name,
    }
    if "weight" in item or alike is not None:
        pinned["weight"] = item.get("weight", alike)
    if needs and parent.has_statistics(needs):
        pinned["statistics"] = selectors.file(parent.revision, STATISTICS).blob_id
    return pinned


def expert_revision(full_name: str, name: object, *, viewer: Viewer, pointer: str) -> Revision:
    """The revision of an expert that a recipe means, ready to be merged. Raises as `register` does."""
    if name is not None and not isinstance(name, str):
        fault = Fault(
            f"{pointer}/revision", type(name).__name__, "a branch, a tag or a commit", "Leave it out for main."
        )
        raise RecipeInvalid("A revision is named by text.", faults=[fault])
    if full_name.startswith(f"{selectors.MERGES}/"):
        fault = Fault(f"{pointer}/expert", full_name[:200], "an expert", "Merge the experts of that merge themselves.")
        raise RecipeInvalid("A merge cannot be an expert of another merge.", faults=[fault])
    names.split(full_name, pointer=f"{pointer}/expert")
    try:
        expert = selectors.expert(full_name, viewer)
    except ExpertNotFound as error:
        fault = Fault(f"{pointer}/expert", full_name[:200], "an expert that you may see", "Correct the name.")
        raise ExpertNotFound(error.detail, faults=[fault]) from error
    if expert.yanked_at is not None:
        fault = Fault(
            f"{pointer}/expert", "a yanked expert", "one that is listed", expert.yank_reason or "Choose another."
        )
        raise ExpertsIncompatible(f"{expert.full_name} is yanked.", faults=[fault])
    try:
        revision = selectors.revision(selectors.Repository(expert, None), name or "main")
    except RevisionNotFound as error:
        fault = Fault(
            f"{pointer}/revision", name or "main", "a branch, a tag or a commit of it", "Leave it out for main."
        )
        raise RevisionNotFound(error.detail, faults=[fault]) from error
    if revision.state != Revision.State.READY:
        remedy = {
            Revision.State.PROCESSING: "Wait until its jobs are done.",
            Revision.State.FAILED: "Look at its jobs, correct the upload and try again.",
            Revision.State.INCOMPLETE: "Upload adapter_config.json and adapter_model.safetensors.",
        }[Revision.State(revision.state)]
        fault = Fault(f"{pointer}/expert", revision.state, "ready", remedy)
        raise NotReady(f"{expert.full_name} is not ready to be merged.", faults=[fault])
    # The row that was just read is the one that its name and namespace are taken from.
    revision.expert = expert
    return revision


def content_digest(revision: Revision) -> str:
    """What an adapter is, apart from its name and card."""
    paths = [files.WEIGHTS, files.CONFIG]
    blobs = dict(File.objects.filter(revision=revision, path__in=paths).values_list("path", "blob_id"))
    return adapters.content_digest(blobs[files.WEIGHTS], blobs[files.CONFIG])
