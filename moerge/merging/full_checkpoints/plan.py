"""Which tensors full checkpoints have in common: what is merged, what is tied, what is copied, and what is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from moerge.errors import ExpertsIncompatible
from moerge.merging.outputs import DTYPES
from moerge.merging.recipe import Recipe
from moerge.tensors import files
from moerge.tensors.checkpoints import Checkpoint
from moerge.tensors.files import SafetensorsFile

FLOATS = frozenset(DTYPES.values())
_COMPARED_BYTES = 1 << 20
_PRINT_BYTES = 1 << 12


@dataclass(frozen=True)
class Model:
    """One checkpoint, who it is in messages, and which of its tensors answers to each name of the plan."""

    label: str
    checkpoint: Checkpoint
    own: Mapping[str, str] = field(default_factory=dict)

    def file(self, name: str) -> tuple[SafetensorsFile, str]:
        own = self.own.get(name, name)
        return self.checkpoint.file_of(own), own

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.info(self.own.get(name, name)).shape

    def dtype(self, name: str) -> str:
        return self.checkpoint.info(self.own.get(name, name)).dtype

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors of this checkpoint hold the same bytes."""
        return _are_equal(self, name, self, other)


@dataclass(frozen=True)
class Plan:
    """What becomes of every name: merged, the same as another one that is merged, or copied."""

    reference: Model
    base: Model | None
    experts: tuple[Model, ...]
    floats: tuple[str, ...]
    tied: Mapping[str, str]
    copied: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reference.shape(name)

    def size(self, name: str) -> int:
        return math.prod(self.shape(name))

    @property
    def values(self) -> int:
        """Of all tensors that are merged, together."""
        return sum(self.size(name) for name in self.floats)


def planned(recipe: Recipe, experts: Sequence[Checkpoint], base: Checkpoint | None) -> Plan:
    """Check that all checkpoints hold the same tensors, and sort them. Raises ExpertsIncompatible."""
    labels = [expert.expert for expert in recipe.experts]
    reference = Model(labels[0], experts[0]) if base is None else Model("the base", base)
    models = tuple(
        _resolved(Model(label, checkpoint), reference, position)
        for position, (label, checkpoint) in enumerate(zip(labels, experts, strict=True))
    )
    floats: list[str] = []
    copied: list[str] = []
    for name in reference.checkpoint.names:
        _check_shapes(name, reference, models)
        is_float = reference.dtype(name) in FLOATS
        if not is_float:
            _check_equal(name, reference, models)
        is_merged = is_float and 0 not in reference.shape(name)
        (floats if is_merged else copied).append(name)
    tied = _tied(floats, models if base is None else (reference, *models))
    return Plan(
        reference,
        None if base is None else reference,
        models,
        tuple(name for name in floats if name not in tied),
        tied,
        tuple(copied),
    )


def _resolved(model: Model, reference: Model, position: int) -> Model:
    """The checkpoint with a tensor for each name of the reference; a tied tensor may be stored once or twice.

    Raises ExpertsIncompatible when a tensor is missing or one too many.
    """
    has = model.checkpoint
    shared = [name for name in reference.checkpoint.names if name in has]
    own = {}
    for name in reference.checkpoint.names:
        if name not in has:
            twin = next((other for other in shared if reference.are_equal(name, other)), None)
            if twin is None:
                _differ(f"{model.label} has no tensor {name}", position, met="nothing",
                        wanted=f"{name}, as {reference.label} has it")  # fmt: skip
            own[name] = twin
    for name in has.names:
        if name not in reference.checkpoint and not any(model.are_equal(name, other) for other in shared):
            _differ(f"{model.label} has a tensor {name}, and {reference.label} has none", position, met=name,
                    wanted="the tensors of the base")  # fmt: skip
    return replace(model, own=own)


def _check_shapes(name: str, reference: Model, models: Sequence[Model]) -> None:
    wanted, dtype = reference.shape(name), reference.dtype(name)
    for position, model in enumerate(models):
        met = model.shape(name)
        if met != wanted:
            same = [other.label for other in (reference, *models) if other.shape(name) == wanted]
            _differ(
                f"{name} has shape {list(met)} in {model.label} and {list(wanted)} in {', '.join(dict.fromkeys(same))}",
                position,
                met=list(met),
                wanted=list(wanted),
            )
        own = model.dtype(name)
        if own != dtype and not {own, dtype} <= FLOATS:
            _differ(
                f"{name} is {own} in {model.label} and {dtype} in {reference.label}", position, met=own, wanted=dtype
            )


def _check_equal(name: str, reference: Model, models: Sequence[Model]) -> None:
    """What is not a weight, such as position ids, cannot be merged."""
    for position, model in enumerate(models):
        if not _are_equal(model, name, reference, name):
            _differ(
                f"{name} differs between {model.label} and {reference.label}, and {reference.dtype(name)} cannot be"
                " merged",
                position,
                met="other values",
                wanted=f"the values of {reference.label}",
            )


def _differ(what: str, position: int, *, met: object, wanted: object) -> NoReturn:
    raise ExpertsIncompatible(
        f"{what}.",
        pointer=f"/experts/{position}",
        met=met,
        wanted=wanted,
        remedy="Merge checkpoints of one base model and vocabulary.",
    )


def _tied(names: Sequence[str], models: Sequence[Model]) -> dict[str, str]:
    """Tensor -> the first tensor that is the same in every checkpoint, such as a head and the embeddings it is tied to.

    Merged apart, they would no longer be the same after a method with noise.
    """
    alike: dict[object, list[str]] = {}
    for name in names:
        file, own = models[0].file(name)
        info = file.info(own)
        start = file.read_data(info.start, min(_PRINT_BYTES, info.end - info.start))
        alike.setdefault((info.shape, info.dtype, start), []).append(name)
    found: dict[str, str] = {}
    for group in alike.values():
        firsts: list[str] = []
        for name in group:
            first = next((one for one in firsts if all(model.are_equal(name, one) for model in models)), None)
            if first is None:
                firsts.append(name)
            else:
                found[name] = first
    return found


def _are_equal(model: Model, name: str, other: Model, other_name: str) -> bool:
    (one, own), (two, others) = model.file(name), other.file(other_name)
    a, b = one.info(own), two.info(others)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (one, own) == (two, others):
        return True
    pairs = zip(
        files.raw_blocks(one, own, _COMPARED_BYTES), files.raw_blocks(two, others, _COMPARED_BYTES), strict=True
    )
    return all(left == right for left, right in pairs)
