"""What the experts of a recipe bring to a merge, as sources of the engine; refused by name where they do not fit.

A merge has tensors of four kinds. Deltas of modules keep the modules' names, so that noise and thresholds do not depend
on what else an adapter holds; the others have names that say what they are.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import cost
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Array, Given, Source, Stored
from moerge.merging.statistics import Statistics
from moerge.tensors import files, places
from moerge.tensors.adapters import Adapter, BaseWeights, Dense, Layout
from moerge.tensors.files import Float32, SafetensorsFile

Told = TypeVar("Told", Layout, bool)
Role = Literal["module", "bias", "gain", "saved"]

# Blockers of an adapter (moerge.tensors.adapters.load) that a merge deals with itself.
ACCEPTED = ("/modules_to_save", "/bias")
ADD_BASE = "Have the operator put the base's weights into the hub (bin/manage add_base_weights), or hand them in."
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class Place:
    """What a merged tensor is: the delta of a module's weight or output bias, IA3's gain, or a change of the base.

    `name` is the module's, or the base's for a tensor of the base.
    """

    role: Role
    name: str

    @property
    def key(self) -> str:
        """The tensor's name in the engine."""
        return self.name if self.role in {"module", "gain"} else f"{self.name} ({self.role})"


@dataclass(frozen=True)
class Kept:
    """A tensor that replaces one of the base and is kept as one expert has it."""

    expert: str
    adapter: Adapter
    name: str
    shape: tuple[int, ...]

    def values(self) -> Float32:
        """Read from the expert's file. Raises ExpertsIncompatible when a value is not finite."""
        found = self.adapter.saved[self.name]
        if not np.isfinite(found).all():
            raise _not_finite(self.expert, self.name)
        return found


@dataclass(frozen=True, kw_only=True)
class Brought:
    """All experts of a recipe, ready for the engine.

    `places` say what each tensor of the engine is, `kept` what is taken over unmerged. `shapes` are (d_out, d_in) of
    the modules, `layouts` how they lie in the base, `feedforward` the modules whose gain multiplies what they take in.
    """

    sources: tuple[Source, ...]
    places: Mapping[str, Place]
    kept: Mapping[str, Kept]
    shapes: Mapping[str, tuple[int, int]]
    layouts: Mapping[str, Layout]
    feedforward: Collection[str]
    sizes: tuple[Mapping[str, cost.Shape], ...]
    saved: tuple[Mapping[str, tuple[int, ...]], ...]
    base_model: str | None
    fan_in_fan_out: bool


def gather(
    recipe: Recipe,
    adapters_by_digest: Mapping[str, Adapter],
    *,
    base: BaseWeights | None,
    statistics_by_digest: Mapping[str, Statistics],
    opened: ExitStack,
) -> Brought:
    """What the experts bring, in the order of the recipe; files stay open as long as `opened` does.

    Raises ExpertsIncompatible, RecipeInvalid.
    """
    check_base(recipe, base)
    found = [_adapter(recipe, position, adapters_by_digest) for position in range(len(recipe.experts))]
    _check_families(recipe, found)
    changes, kept = _saved(recipe, found, base, opened)
    layouts = _agreed(recipe, [adapter.facts.layouts for adapter in found])
    sides = _agreed(recipe, [{name: name in one.facts.feedforward for name in one.gains} for one in found])
    known: dict[str, Place] = {}
    sources, sizes = [], []
    for position, (expert, adapter) in enumerate(zip(recipe.experts, found, strict=True)):
        tensors = _Tensors(expert.expert, adapter, changes[position], kind=recipe.output.kind)
        known |= tensors.places
        sizes.append(_sizes(adapter, tensors))
        sources.append(
            Source(
                expert.digest,
                expert.weight,
                tensors,
                label=expert.expert,
                shapes=tensors.shapes,
                statistics=statistics_by_digest.get(expert.statistics or "", {}),
            )
        )
    return Brought(
        sources=tuple(sources),
        places=known,
        kept=kept,
        shapes={name: (shape[0], shape[1]) for source in sources for name, shape in (source.shapes or {}).items()
                if known[name].role == "module"},
        layouts=layouts,
        feedforward={name for name, is_feedforward in sides.items() if is_feedforward},
        sizes=tuple(sizes),
        saved=(
            *({name: change.shape for name, change in one.items()} for one in changes),
            {name: one.shape for name, one in kept.items()},
        ),
        base_model=recipe.base_model or found[0].config.base_model_name_or_path,
        fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in found),
    )  # fmt: skip


def check_base(recipe: Recipe, base: BaseWeights | None) -> None:
    """Raise ExpertsIncompatible when the recipe needs weights of the base that are not those handed in."""
    wanted = recipe.base_weights
    if base is None and (wanted is not None or recipe.output.kind == "full"):
        raise ExpertsIncompatible(
            f"The weights of {recipe.base_model or 'the base model'} are needed, and they are not here.",
            pointer="/base_weights" if wanted else "/output/kind",
            met="no weights of the base",
            wanted=wanted or "the weights of the base model",
            remedy=ADD_BASE,
        )
    if base is not None and wanted is not None and base.digest != wanted:
        raise ExpertsIncompatible(
            f"The weights of {recipe.base_model or 'the base model'} are not those that the recipe was made with.",
            pointer="/base_weights",
            met=base.digest,
            wanted=wanted,
            remedy=ADD_BASE,
        )


class _Tensors(Mapping[str, Given | Stored]):
    """All that one adapter brings, read at each look-up; refuses values that are not finite."""

    def __init__(self, expert: str, adapter: Adapter, changes: Mapping[str, "_Change"], *, kind: str) -> None:
        self._expert, self._adapter, self._changes = expert, adapter, changes
        if kind == "ia3":
            found = [Place("gain", name) for name in adapter.gains]
        else:
            found = [Place("module", name) for name in adapter.modules]
            found += [Place("bias", name) for name in adapter.biases]
        found += [Place("saved", name) for name in changes]
        self.places = {place.key: place for place in found}
        self.shapes = {key: self._shape(place) for key, place in self.places.items()}

    def _shape(self, place: Place) -> tuple[int, ...]:
        facts = self._adapter.facts
        if place.role == "gain":
            return (facts.gains[place.name],)
        if place.role == "saved":
            return self._changes[place.name].shape
        return facts.shapes[place.name] if place.role == "module" else facts.shapes[place.name][:1]

    def __getitem__(self, key: str) -> Given | Stored:
        place = self.places[key]
        if place.role == "saved":
            return self._changes[place.name]
        if place.role == "bias":
            return self._finite(self._adapter.biases[place.name], key)
        if place.role == "gain":
            return self._finite(self._adapter.gains[place.name].values, key)
        found = self._adapter.modules[place.name]
        if isinstance(found, Dense):
            return self._finite(found.values, key)
        self._finite(found.A, key)
        self._finite(found.B, key)
        return found

    def _finite(self, values: Array, name: str) -> Array:
        if not np.isfinite(values).all():
            raise _not_finite(self._expert, name)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the module to see whether it is there.
        return name in self.places


def _agreed(recipe: Recipe, told: Sequence[Mapping[str, Told]]) -> dict[str, Told]:
    """What the experts say of their modules. Raises ExpertsIncompatible where two say different things."""
    agreed: dict[str, Told] = {}
    for position, mine in enumerate(told):
        for module, met in mine.items():
            wanted = agreed.setdefault(module, met)
            if met != wanted:
                raise ExpertsIncompatible(
                    f"{module} is {_said(met)} in {recipe.experts[position].expert} and {_said(wanted)} in another"
                    " expert.",
                    pointer=f"/experts/{position}",
                    met=_said(met),
                    wanted=_said(wanted),
                    remedy="Merge experts of one base model.",
                )
    return agreed


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "multiplied by inputs" if value else "multiplied by outputs"
    return str(value)


def _not_finite(expert: str, name: str) -> ExpertsIncompatible:
    return ExpertsIncompatible(
        f"{expert} holds NaN or infinity in {name}.",
        pointer="/experts",
        met="a value that is not finite",
        wanted="finite values",
        remedy=f"Leave {expert} out.",
    )


@dataclass(frozen=True, eq=False)
class _Change(Stored):
    """What an expert changed in a tensor of the base: its own less the base's, read in stretches."""

    expert: str
    file: SafetensorsFile
    name: str
    base: SafetensorsFile
    base_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.info(self.name).shape)

    def read(self, start: int, stop: int, *, out: Array) -> Array:
        """Values start .. stop of the flattened change."""
        mine = self.file.block(self.name, start, stop - start)
        np.subtract(mine, self.base.block(self.base_name, start, stop - start), out=out)
        if not np.isfinite(out).all():
            raise _not_finite(self.expert, self.name)
        return out


def _adapter(recipe: Recipe, position: int, adapters_by_digest: Mapping[str, Adapter]) -> Adapter:
    expert = recipe.experts[position]
    adapter = adapters_by_digest.get(expert.digest)
    if adapter is None:
        raise ExpertsIncompatible(
            f"The adapter of {expert.expert} was not handed in.",
            pointer=f"/experts/{position}",
            met="nothing",
            wanted=expert.digest,
            remedy="Hand in one adapter per digest of the recipe.",
        )
    first = adapters_by_digest[recipe.experts[0].digest].config.base_model_name_or_path
    mine = adapter.config.base_model_name_or_path
    if recipe.base_model is None and mine != first:
        raise ExpertsIncompatible(
            f"{expert.expert} was trained on {mine}, {recipe.experts[0].expert} on {first}.",
            pointer=f"/experts/{position}",
            met=mine,
            wanted=first,
            remedy="Merge experts of one base model, or name base_model when both names mean the same.",
        )
    return adapter


def _check_families(recipe: Recipe, found: Sequence[Adapter]) -> None:
    """Raise ExpertsIncompatible when an expert's family cannot give the output asked for."""
    is_ia3 = recipe.output.kind == "ia3"
    for position, (expert, adapter) in enumerate(zip(recipe.experts, found, strict=True)):
        if is_ia3 and adapter.family != "ia3":
            raise ExpertsIncompatible(
                f"{expert.expert} is {adapter.facts.kind}, and only IA3 experts become IA3.",
                pointer=f"/experts/{position}",
                met=adapter.facts.kind,
                wanted="ia3",
                remedy="Leave it out, or ask for output lora, which takes other experts where the base's weights are"
                " at hand.",
            )
        if not is_ia3 and adapter.gains and not adapter.modules:
            every = all(one.family == "ia3" for one in found)
            raise ExpertsIncompatible(
                f"{expert.expert} is IA3, which multiplies what the base computes: its delta needs the base's weights.",
                pointer=f"/experts/{position}",
                met="ia3",
                wanted="an expert whose delta is known from its files, or the base's weights",
                remedy="Ask for output.kind ia3, which needs no weights of the base." if every else ADD_BASE,
            )
        if recipe.output.kind == "lora" and recipe.spec.rank_rule == "all" and _is_dense(adapter):
            raise ExpertsIncompatible(
                f"{recipe.method} keeps the factors of every expert, and {expert.expert} is {_variant(adapter)}, whose"
                " delta has none.",
                pointer="/method",
                met=recipe.method,
                wanted="a method on deltas",
                remedy="Use linear, which gives the same sum.",
            )


def _variant(adapter: Adapter) -> str:
    return "DoRA" if adapter.config.use_dora else adapter.facts.kind


def _is_dense(adapter: Adapter) -> bool:
    """Whether an adapter's deltas come as matrices, not as factors."""
    return adapter.config.use_dora or adapter.family == "ia3"


def _sizes(adapter: Adapter, tensors: _Tensors) -> dict[str, cost.Shape]:
    """What `cost.estimate` wants to know of one expert."""
    is_dense = _is_dense(adapter)
    found: dict[str, cost.Shape] = {}
    for key, place in tensors.places.items():
        shape = tensors.shapes[key]
        if place.role == "module":
            found[key] = (shape[0], shape[1], 0 if is_dense else adapter.facts.ranks[place.name])
        elif place.role == "gain":
            found[key] = (1, shape[0], 0)
    return found


def _saved(
    recipe: Recipe, found: Sequence[Adapter], base: BaseWeights | None, opened: ExitStack
) -> tuple[list[dict[str, _Change]], dict[str, Kept]]:
    """Per expert the changes of saved tensors that are merged, and the tensors that are kept as one expert has them."""
    changes: list[dict[str, _Change]] = [{} for _ in found]
    kept: dict[str, Kept] = {}
    names = sorted({name for adapter in found for name in adapter.saved})
    preferred = _preferred(recipe)
    if not names:
        return changes, kept
    opened_files = [opened.enter_context(files.open_file(adapter.path)) for adapter in found]
    stored = [_stored_names(adapter) for adapter in found]
    for name in names:
        owners = [position for position, adapter in enumerate(found) if name in adapter.saved]
        shapes = {position: tuple(opened_files[position].info(stored[position][name]).shape) for position in owners}
        _check_sizes(recipe, name, shapes)
        shape = shapes[owners[0]]
        in_base = None if base is None else base.find(name)
        if preferred in owners:
            kept[name] = Kept(recipe.experts[preferred].expert, found[preferred], name, shape)
        elif base is not None and in_base is not None and tuple(base.checkpoint.info(in_base).shape) == shape:
            for position in owners:
                changes[position][name] = _Change(
                    recipe.experts[position].expert, opened_files[position], stored[position][name],
                    base.checkpoint.file_of(in_base), in_base,
                )  # fmt: skip
        elif len({_fingerprint(opened_files[position], stored[position][name]) for position in owners}) == 1:
            kept[name] = Kept(recipe.experts[owners[0]].expert, found[owners[0]], name, shape)
        else:
            raise _undecided(recipe, names, found)
    return changes, kept


def _preferred(recipe: Recipe) -> int:
    """The position of the expert whose saved tensors are to be kept, -1 where the recipe names none."""
    wanted = recipe.output.saved
    if wanted is None:
        return -1
    known = [expert.expert for expert in recipe.experts]
    if wanted not in known:
        raise RecipeInvalid(
            f"{wanted} is not an expert of this recipe.",
            pointer="/output/saved",
            met=wanted,
            wanted="one of " + ", ".join(known),
            remedy="Name the expert whose saved modules are to be kept.",
        )
    return known.index(wanted)


def _stored_names(adapter: Adapter) -> dict[str, str]:
    """What the base calls each saved tensor -> its name in the adapter's file."""
    return {places.of_base_tensor(name): name for name in (*adapter.facts.saved, *adapter.facts.biases)}


def _check_sizes(recipe: Recipe, name: str, shapes: Mapping[int, tuple[int, ...]]) -> None:
    (first, wanted), *others = shapes.items()
    for position, shape in others:
        if shape != wanted:
            mine, theirs = recipe.experts[position].expert, recipe.experts[first].expert
            raise ExpertsIncompatible(
                f"{name} has shape {list(shape)} in {mine} and {list(wanted)} in {theirs}: their vocabularies or labels"
                " differ.",
                pointer=f"/experts/{position}",
                met=list(shape),
                wanted=list(wanted),
                remedy="Merge experts of one vocabulary and one set of labels.",
            )


def _fingerprint(file: SafetensorsFile, name: str) -> bytes:
    """Equal for tensors of equal values, whatever dtype they are stored in."""
    found = hashlib.sha256()
    for block in files.float32_blocks(file, name, _BLOCK_VALUES):
        # Adding zero makes -0.0 and 0.0 one value.
        found.update((block + np.float32(0)).tobytes())
    return found.digest()


def _undecided(recipe: Recipe, names: Sequence[str], found: Sequence[Adapter]) -> ExpertsIncompatible:
    owners = [
        expert.expert
        for expert, adapter in zip(recipe.experts, found, strict=True)
        if any(n in adapter.saved for n in names)
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ExpertsIncompatible(
        f"{', '.join(owners)} each have their own {shown}, which can be merged only as changes of the base's.",
        pointer="/output/saved",
        met="nothing",
        wanted="one of " + ", ".join(owners),
        remedy=f"Name the expert whose are kept as output.saved. {ADD_BASE}",
    )
