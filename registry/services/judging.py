"""Whether the experts of a recipe can be merged with each other and into what is wanted, from rows alone.

Everything here is said before a merge has a row or a job, and names the expert and the field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from django.conf import settings

from moerge.merging import cost
from moerge.merging.base import output_rank
from moerge.merging.cost import Cost
from moerge.merging.recipe import Recipe
from moerge.tensors.bases import BaseWeights
from moerge.tensors.targets import of_base
from registry.errors import ExpertsIncompatible, Fault, RecipeInvalid
from registry.models import BaseModel
from registry.services import base_weights
from registry.services.layouts import Module
from registry.services.parents import Parent

MOST_NAMES = 20
_VOCABULARY = ("embed", "wte", "lm_head", "head", "shared", "score", "classifier")


@dataclass(frozen=True)
class Missing:
    """The modules that an expert lacks and another has: how many, and the first names."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """A recipe that may be carried out. `cost` is None where a revision is too old to tell its modules."""

    recipe: Recipe
    cost: Cost | None
    missing: Mapping[int, Missing]  # by the expert's position in the request
    warnings: tuple[str, ...]


def judge(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> Judgement:
    """Raises ExpertsIncompatible or RecipeInvalid. The recipe names the base's weights where the result needs them."""
    _check_kept(recipe, parents)
    recipe = _with_base(recipe, parents, base=base)
    _check_shapes(parents)
    _check_parts(parents)
    _check_equal_ranks(recipe, parents)
    found = _cost(recipe, parents, base=base)
    if found is not None:
        _check_rank(recipe, parents, found)
        _check_memory(found)
    missing = _missing(parents)
    return Judgement(recipe, found, missing, tuple(_warnings(recipe, parents, found, missing)))


def incompatible(detail: str, pointer: str, met: object, wanted: object, remedy: str) -> ExpertsIncompatible:
    """A refusal with one fault."""
    return ExpertsIncompatible(detail, faults=[Fault(pointer, met, wanted, remedy)])


def _check_kept(recipe: Recipe, parents: Sequence[Parent]) -> None:
    names = [parent.name for parent in parents]
    if recipe.output.saved is not None and recipe.output.saved not in names:
        wanted = "one of " + ", ".join(names[:MOST_NAMES])
        raise RecipeInvalid(
            f"{recipe.output.saved[:200]} is no expert of this recipe.",
            faults=[Fault("/output/saved", recipe.output.saved[:200], wanted, "Name an expert of the recipe.")],
        )


# The base's weights


def _with_base(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> Recipe:
    """The recipe with the digest of the base's weights where the result depends on them, and without elsewhere."""
    known = base.weights.get("digest")
    if recipe.base_weights not in (None, known):
        remedy = "Leave base_weights out, or have the operator add those weights."
        fault = Fault("/base_weights", recipe.base_weights, known or "none: the hub has no weights of it", remedy)
        raise ExpertsIncompatible(f"The hub has other weights of {base.name}, or none.", faults=[fault])
    faults = _needing_base(recipe, parents, base=base)
    if faults and not known:
        raise ExpertsIncompatible(faults[0][0], faults=[fault for _, fault in faults])
    return replace(recipe, base_weights=known if faults else None)


def _needing_base(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> list[tuple[str, Fault]]:
    """What cannot be done without the base's weights: sentence and fault of each, which says how they are added.

    Raises ExpertsIncompatible for what cannot be done at all.
    """
    remedy = f"An operator adds the weights of the base: bin/manage add_base_weights {base.name} FOLDER"
    weights = f"the weights of {base.name}, which the hub does not have"
    found: list[tuple[str, Fault]] = []
    for parent in parents:
        hopeless = [item for item in parent.blockers if not item.get("needs_base")]
        if hopeless:
            raise _blocked(parent, hopeless)
        for item in parent.blockers:
            detail = f"{parent.name} cannot be merged without the base ({item['pointer']}): {item['reason']}."
            found.append((detail, Fault(f"{parent.pointer}/expert", item["met"], weights, remedy)))
    _check_families(recipe, parents)
    multiplying = [parent for parent in parents if parent.family == "ia3"]
    if multiplying and recipe.output.kind != "ia3":
        first, adding = multiplying[0], [parent for parent in parents if parent.family != "ia3"]
        if adding:
            detail = (
                f"{first.name} is IA3 and {adding[0].name} is {adding[0].kind}: they meet only as deltas of the base."
            )
            fault = Fault(f"{first.pointer}/expert", "ia3", f"{adding[0].kind}, or {weights}", remedy)
        else:
            detail = f"{first.name} multiplies what the base computes, so output {recipe.output.kind} needs the base."
            fault = Fault("/output/kind", recipe.output.kind, f"ia3, or {weights}", f"Ask for output ia3. Or: {remedy}")
        found.append((detail, fault))
    if recipe.output.kind == "full":
        detail = f"Full weights are the base with the delta added, and the hub has no weights of {base.name}."
        found.append((detail, Fault("/output/kind", "full", weights, f"{remedy}. Or ask for output lora or delta.")))
    if recipe.output.kind in {"delta", "ternary", "full"}:
        found += _replacing(recipe, parents, base=base)
    return [*found, *_contested(recipe, parents, base=base)]


def _check_families(recipe: Recipe, parents: Sequence[Parent]) -> None:
    """Raise ExpertsIncompatible where an expert cannot become what is wanted, whatever else is at hand."""
    for parent in parents:
        if recipe.output.kind == "ia3" and parent.family != "ia3":
            raise incompatible(
                f"{parent.name} is {parent.kind}, and only IA3 experts become IA3.",
                f"{parent.pointer}/expert",
                parent.kind,
                "ia3",
                "Ask for output lora or delta, or leave it out.",
            )
        if recipe.output.kind == "lora" and recipe.spec.rank_rule == "all" and parent.is_dense:
            raise incompatible(
                f"{recipe.method} keeps the factors of every expert, and the delta of {parent.name} has none.",
                "/method",
                recipe.method,
                "a method on deltas",
                "Use linear, which gives the same sum.",
            )


def _contested(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> list[tuple[str, Fault]]:
    """Saved tensors that are merged as changes of the base's: sentence and fault where they cannot be without it.

    What one expert alone has, or the one that `output.saved` names, is kept as it is. Raises ExpertsIncompatible where
    several experts have their own and the base has none to compare with.
    """
    owners: dict[str, list[Parent]] = {}
    for parent in parents:
        for name in parent.saved:
            owners.setdefault(name, []).append(parent)
    keeper = recipe.output.saved
    several = {
        name: found for name, found in owners.items() if len(found) > 1 and keeper not in [one.name for one in found]
    }
    if base.weights and several:
        with base_weights.open(base) as weights:
            several = {name: found for name, found in several.items() if not _has(weights, name, found[0].saved[name])}
        if not several:
            return [("", Fault("/output/saved"))]
    elif base.weights and owners and keeper is None:
        return [("", Fault("/output/saved"))]
    if not several:
        return []
    name, found = next(iter(several.items()))
    names = [one.name for one in found]
    remedy = "Name the expert whose saved tensors are kept as output.saved."
    if not base.weights:
        remedy += f" Or an operator adds the weights of the base: bin/manage add_base_weights {base.name} FOLDER"
    detail = f"{' and '.join(names[:5])} each have their own {name}, which can be merged only as changes of the base's."
    faults = [Fault(f"{found[-1].pointer}/expert", name, "a tensor that the base has", remedy)]
    faults.append(Fault("/output/saved", None, "one of " + ", ".join(names), remedy))
    raise ExpertsIncompatible(detail, faults=faults)


def _replacing(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> list[tuple[str, Fault]]:
    """Saved tensors in an output that is added to the base: sentence and fault where the base is needed for them.

    Raises ExpertsIncompatible where the base has no such tensor to add to.
    """
    owners = {name: parent for parent in parents for name in parent.saved}
    kind, remedy = recipe.output.kind, "Ask for output lora, which keeps such tensors as they are."
    absent = list(owners)
    if base.weights and owners:
        with base_weights.open(base) as weights:
            absent = [name for name, parent in owners.items() if not _has(weights, name, parent.saved[name])]
        if not absent:
            return [("", Fault("/output/kind"))]
    if not absent:
        return []
    detail = f"{owners[absent[0]].name} replaces {absent[0]} of the base, and what it adds to it is not known."
    if base.weights:
        raise incompatible(detail, "/output/kind", kind, f"lora: {base.name} has no such tensor of this shape", remedy)
    remedy += f" Or an operator adds the weights of the base: bin/manage add_base_weights {base.name} FOLDER"
    wanted = f"lora, or the weights of {base.name}, which the hub does not have"
    return [(detail, Fault("/output/kind", kind, wanted, remedy))]


def _has(weights: BaseWeights, name: str, shape: tuple[int, ...]) -> bool:
    found = weights.find(name)
    return found is not None and tuple(weights.checkpoint.info(found).shape) == shape


def _blocked(parent: Parent, blockers: Sequence[Mapping[str, Any]]) -> ExpertsIncompatible:
    first = blockers[0]
    faults = [
        Fault(f"{parent.pointer}/expert", item["met"], "an adapter whose delta can be formed", item["remedy"])
        for item in blockers
    ]
    return ExpertsIncompatible(
        f"{parent.name} cannot be merged ({first['pointer']}): {first['reason']}.", faults=faults
    )


# Shapes, ranks, memory


def _check_shapes(parents: Sequence[Parent]) -> None:
    """Raise ExpertsIncompatible where two experts have a module, or a saved tensor, of different shapes."""
    known: dict[str, tuple[tuple[int, ...], Parent]] = {}
    seen: list[Mapping[str, Module]] = []
    for parent in parents:
        modules = parent.modules or {}
        # Experts with the same modules share one mapping, which needs to be looked at once.
        is_new = not any(modules is other for other in seen)
        shapes = {name: module.shape for name, module in modules.items()} if is_new else {}
        seen.append(modules)
        for name, shape in [*shapes.items(), *parent.saved.items()]:
            wanted, other = known.setdefault(name, (shape, parent))
            if wanted != shape and parent.family == other.family:
                raise _unlike(name, shape, parent, wanted, other)


def _check_parts(parents: Sequence[Parent]) -> None:
    """Raise ExpertsIncompatible where one expert replaces a whole module and another has a delta of it."""
    owners = {
        name.rpartition(".")[0]: parent for parent in parents for name in parent.saved if not name.endswith(".bias")
    }
    for parent in parents if owners else ():
        for module in parent.modules or ():
            parts = of_base(module).split(".")
            for length in range(len(parts), 0, -1):
                owner = owners.get(".".join(parts[:length]))
                if owner is not None:
                    raise incompatible(
                        f"{owner.name} replaces {module} as a whole, and {parent.name} has a delta of it.",
                        f"{parent.pointer}/expert",
                        module,
                        f"a module that {owner.name} leaves in place",
                        "Leave one of the two experts out.",
                    )


def _check_equal_ranks(recipe: Recipe, parents: Sequence[Parent]) -> None:
    """Raise ExpertsIncompatible where a method that merges A and B apart meets two ranks in one module."""
    # Of methods that take whole deltas only these give a result of the largest rank.
    if recipe.spec.form != "whole" or recipe.spec.rank_rule != "largest":
        return
    known: dict[str, tuple[int, Parent]] = {}
    for parent in parents:
        for name, module in (parent.modules or {}).items():
            wanted, other = known.setdefault(name, (module.rank, parent))
            if module.rank != wanted:
                raise incompatible(
                    f"{name} has rank {module.rank} in {parent.name} and {wanted} in {other.name}; {recipe.method}"
                    " merges A and B apart, which takes equal ranks.",
                    f"{parent.pointer}/expert",
                    module.rank,
                    wanted,
                    "Use linear or ties, which merge deltas and take any ranks.",
                )


def _unlike(
    name: str, met: tuple[int, ...], parent: Parent, wanted: tuple[int, ...], other: Parent
) -> ExpertsIncompatible:
    is_vocabulary = any(word in part for part in name.split(".")[-3:] for word in _VOCABULARY)
    why = "their vocabularies or labels differ" if is_vocabulary else "they were trained on different layers"
    shown, theirs = (" x ".join(map(str, filter(None, shape))) for shape in (met, wanted))
    return incompatible(
        f"{name} is {shown} in {parent.name} and {theirs} in {other.name}: {why}.",
        f"{parent.pointer}/expert",
        {"module": name, "shape": list(met)},
        {"module": name, "shape": list(wanted)},
        "Merge experts that have the same shapes, or leave one out.",
    )


def _cost(recipe: Recipe, parents: Sequence[Parent], *, base: BaseModel) -> Cost | None:
    """What the merge takes; None where the modules of some expert are not known."""
    is_gain = recipe.output.kind == "ia3"
    if any(parent.modules is None or (parent.family == "ia3" and not is_gain) for parent in parents):
        return None
    return cost.estimate(
        recipe.spec,
        recipe.output,
        [_of_cost(parent) for parent in parents],
        saved=[parent.saved for parent in parents],
        base_bytes=sum(int(file["size"]) for file in base.weights.get("files", {}).values()),
    )


def _of_cost(parent: Parent) -> dict[str, tuple[int, int, int]]:
    modules = parent.modules or {}
    if parent.family == "ia3":
        return {name: (1, sum(module.shape), 0) for name, module in modules.items()}
    return {name: (*module.shape, 0 if parent.is_dense else module.rank) for name, module in modules.items()}


def _check_rank(recipe: Recipe, parents: Sequence[Parent], found: Cost) -> None:
    """Raise RecipeInvalid for a rank that no module can have, or that is too small for a method that keeps all."""
    wanted, is_all = recipe.output.rank, recipe.spec.rank_rule == "all"
    if is_all and recipe.output.energy is not None:
        fault = Fault("/output/rank", {"energy": recipe.output.energy}, "a number, or null", "Use linear or svd.")
        raise RecipeInvalid(f"{recipe.method} keeps every factor, whatever energy it holds.", faults=[fault])
    if wanted is None or found.rank is None:
        return
    modules = [parent.modules or {} for parent in parents]
    shapes = {name: module.shape for expert in modules for name, module in expert.items()}
    ranks = [{name: module.rank for name, module in expert.items()} for expert in modules]
    largest = max((min(shape) for shape in shapes.values()), default=1)
    least = output_rank("all", ranks, shapes) if is_all else 1
    if wanted < least:
        remedy = "Use svd for a smaller rank."
        fault = Fault("/output/rank", wanted, f"at least {least}, or null", remedy)
        raise RecipeInvalid(f"{recipe.method} keeps every factor, which takes rank {least}.", faults=[fault])
    if wanted > max(largest, least):
        fault = Fault("/output/rank", wanted, f"at most {largest}, or null", "Ask for a smaller rank.")
        raise RecipeInvalid(f"No module of these experts can have rank {wanted}.", faults=[fault])


def _check_memory(found: Cost) -> None:
    limit = settings.HUB_MERGE_MEMORY_BYTES
    if found.memory_bytes > limit:
        remedy = "Merge fewer experts, ask for a smaller rank, or use linear or svd, which form no dense delta."
        raise RecipeInvalid(
            f"This merge needs about {found.memory_bytes >> 20} MiB and may use {limit >> 20} MiB.",
            faults=[Fault("/experts", found.memory_bytes, limit, remedy)],
        )


# What is worth knowing


def _missing(parents: Sequence[Parent]) -> dict[int, Missing]:
    every: dict[str, None] = {}
    for parent in parents:
        every.update(dict.fromkeys(parent.modules or {}))
    found = {}
    for parent in parents:
        modules = parent.modules
        if modules is not None and len(modules) < len(every):
            names = [name for name in every if name not in modules]
            found[parent.position] = Missing(len(names), tuple(sorted(names)[:MOST_NAMES]))
    return found


def _warnings(
    recipe: Recipe, parents: Sequence[Parent], found: Cost | None, missing: Mapping[int, Missing]
) -> list[str]:
    warnings = [f"{parent.name}: {warning}" for parent in parents for warning in parent.facts.get("warnings", [])]
    for parent in parents:
        if parent.modules is None:
            warnings.append(
                f"{parent.name} was published before its modules were written down: ask again once it is saved anew."
            )
        if parent.position in missing:
            effect = "is left out there" if recipe.parameters.get("missing") == "skip" else "adds nothing there"
            warnings.append(
                f"{parent.name} lacks {missing[parent.position].count} modules that others have, and {effect}."
            )
    is_dense = recipe.spec.rank_rule == "dense" or any(parent.is_dense for parent in parents)
    if is_dense and found is not None and found.rank is not None and recipe.output.energy is None and len(parents) > 1:
        warnings.append(
            f"The result of {recipe.method} is not of low rank: rank {found.rank} keeps a part of it, and the report"
            ' says how large. Ask for rank {"energy": 0.95}, or for output delta or ternary, to keep more.'
        )
    digests = {parent.digest for parent in parents}
    if len(digests) < len(parents):
        warnings.append("Two experts have the same content.")
    return warnings
