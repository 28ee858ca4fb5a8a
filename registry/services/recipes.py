"""Recipes as callers write them: every expert pinned to a revision that the caller may see, and the whole judged."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings

from moerge.errors import ExpertsIncompatible as LibraryIncompatible
from moerge.errors import MoergeError
from moerge.merging import recipe as recipes
from moerge.merging.recipe import Recipe
from moerge.tensors import adapters
from registry import selectors
from registry.checks import files, names
from registry.errors import ExpertNotFound, ExpertsIncompatible, Fault, NotReady, RecipeInvalid
from registry.models import Merge, Revision
from registry.selectors import Viewer
from registry.services import bases

ID_LENGTH = 20


@dataclass(frozen=True)
class Resolved:
    """A recipe whose experts are pinned: what the library parsed, and the revision behind each expert, in its order."""

    recipe: Recipe
    parents: tuple[Revision, ...]

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
    """Whether a recipe can be carried out and what it would give, before any work. Raises as `register` does."""
    resolved = resolve(viewer=viewer, body=body)
    recipe = resolved.recipe
    known = Merge.objects.visible_to(viewer).filter(recipe_id=recipe.digest).first()
    return {
        "ok": True,
        "digest": recipe.digest,
        "repo": f"{selectors.MERGES}/{resolved.merge_id}",
        "commit": resolved.commit,
        "state": known.state if known else None,
        "recipe": recipe.to_dict(),
        "warnings": [
            f"{expert.expert}: {warning}"
            for parent, expert in zip(resolved.parents, recipe.experts, strict=True)
            for warning in parent.facts.get("warnings", [])
        ],
    }


def resolve(*, viewer: Viewer, body: Mapping[str, Any]) -> Resolved:
    """Pin every expert of a recipe to a revision that the viewer may see, then have the library judge the whole."""
    filled = dict(body)
    if filled.get("base_model") is not None and isinstance(filled["base_model"], str):
        filled["base_model"] = bases.resolve(filled["base_model"], pointer="/base_model").name
    items = filled.get("experts")
    found: dict[str, Revision] = {}
    if isinstance(items, list) and 1 <= len(items) <= settings.HUB_MERGE_MAX_EXPERTS:
        # Without any weights every expert counts alike.
        alike = None if any(isinstance(item, dict) and "weight" in item for item in items) else 1 / len(items)
        filled["experts"] = [
            _pinned(item, place, viewer=viewer, alike=alike, found=found) for place, item in enumerate(items)
        ]
    elif isinstance(items, list) and items:
        raise RecipeInvalid(
            "A recipe has too many experts.",
            faults=[
                Fault("/experts", len(items), f"1 to {settings.HUB_MERGE_MAX_EXPERTS}", "Merge some first, or fewer.")
            ],
        )
    try:
        recipe = recipes.parse(filled)
    except LibraryIncompatible as error:
        raise ExpertsIncompatible.of(error) from error
    except MoergeError as error:
        raise RecipeInvalid.of(error) from error
    return Resolved(recipe, tuple(found[expert.digest + expert.revision] for expert in recipe.experts))


def _pinned(item: object, place: int, *, viewer: Viewer, alike: float | None, found: dict[str, Revision]) -> object:
    """One expert of the request with revision, digest, base and weight filled in.

    What is not even a name is left to the library, which refuses it by field.
    """
    if not isinstance(item, dict) or not isinstance(item.get("expert"), str):
        return item
    pointer = f"/experts/{place}"
    unknown = sorted(set(item) - {"expert", "revision", "weight"})
    if unknown:
        fault = Fault(f"{pointer}/{unknown[0]}", unknown[0], "expert, revision, weight", "Leave it out.")
        raise RecipeInvalid(f"There is no field {unknown[0]!r} here.", faults=[fault])
    revision = expert_revision(item["expert"], item.get("revision"), viewer=viewer, pointer=pointer)
    assert revision.expert is not None
    assert revision.base_model is not None
    digest = content_digest(revision)
    found[digest + revision.commit] = revision
    pinned: dict[str, object] = {
        "expert": revision.expert.full_name,
        "revision": revision.commit,
        "digest": digest,
        "base_model": revision.base_model.name,
    }
    if "weight" in item or alike is not None:
        pinned["weight"] = item.get("weight", alike)
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
    revision = selectors.revision(selectors.Repository(expert, None), name or "main")
    if revision.state != Revision.State.READY:
        remedy = {
            Revision.State.PROCESSING: "Wait until its jobs are done.",
            Revision.State.FAILED: "Look at its jobs, correct the upload and try again.",
            Revision.State.INCOMPLETE: "Upload adapter_config.json and adapter_model.safetensors.",
        }[Revision.State(revision.state)]
        fault = Fault(f"{pointer}/expert", revision.state, "ready", remedy)
        raise NotReady(f"{expert.full_name} is not ready to be merged.", faults=[fault])
    if blockers := revision.facts.get("blockers"):
        first = blockers[0]
        fault = Fault(f"{pointer}/expert", first["met"], "an adapter whose delta can be formed", first["remedy"])
        raise ExpertsIncompatible(f"{expert.full_name} cannot be merged: {first['reason']}.", faults=[fault])
    return revision


def content_digest(revision: Revision) -> str:
    """What an adapter is, apart from its name and card: SHA-256 over the digests of its weights and its config."""
    weights = selectors.file(revision, files.WEIGHTS).blob_id
    config = selectors.file(revision, files.CONFIG).blob_id
    return adapters.content_digest(weights, config)
