"""Merge full checkpoints of one base model, tensor by tensor in blocks, so that memory does not grow with the model.

An expert's delta is its tensor less the base's, taken in float32 as it is read. The merged delta is added to the base
and rounded once, to the dtype that is written. Without a base, methods that average merge the weights themselves.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import compiled, engine, full
from moerge.merging.base import Parameters, Spec
from moerge.merging.outputs import DTYPES
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Source, Stored, Watch, never, silent
from moerge.tensors import checkpoints, files
from moerge.tensors.bases import BaseWeights
from moerge.tensors.checkpoints import Checkpoint
from moerge.tensors.files import Float32, SafetensorsFile
from moerge.tensors.header import ITEM_BYTES

Array = npt.NDArray[Any]

# Methods on the lengths and angles of whole tensors.
SPHERICAL = ("slerp", "nuslerp", "multislerp", "karcher")
_WHOLE = (*SPHERICAL, "layer_swapping")
_WITHOUT_BASE = ("linear", *SPHERICAL)
_SUMS = ("linear", "task_arithmetic")
# Ranked over a whole expert whatever its parameters are.
_ACROSS = ("pcb",)
_FLOATS = frozenset(DTYPES.values())
_COMPARED_BYTES = 1 << 20
_PRINT_BYTES = 1 << 12
_WRITTEN_VALUES = 1 << 16
_FIXED_BYTES = 64 << 20


@dataclass(frozen=True)
class Report:
    """What was written: files by name, merged tensors, ties (tensor -> the one it is the same as), copied tensors."""

    method: str
    files: tuple[str, ...]
    merged: tuple[str, ...]
    tied: Mapping[str, str]
    copied: tuple[str, ...]
    values: int
    bytes: int


def merge(
    recipe: Recipe,
    folders: Mapping[str, str | Path],
    out_dir: str | Path,
    *,
    base: BaseWeights | None = None,
    memory_bytes: int | None = None,
    threads: int = 1,
    block_values: int | None = None,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Report:
    """Merge the checkpoints in `folders`, found by `Expert.digest`, and write a checkpoint to `out_dir`.

    `base` is what the experts were trained from. The files that lie beside its weights, such as config and tokenizer,
    are copied; without a base those of the first expert. Threads and blocks change no byte of the result.

    Raises RecipeInvalid when the method cannot be applied to checkpoints or the memory does not fit,
    ExpertsIncompatible when checkpoints do not fit together or hold NaN, CheckpointInvalid when one cannot be read,
    Cancelled when told to stop. Nothing is left in `out_dir` then.
    """
    check(recipe, has_base=base is not None)
    if base is not None and recipe.base_weights is not None and recipe.base_weights != base.digest:
        raise ExpertsIncompatible(
            "The base at hand is not the one that the recipe names.",
            pointer="/base_weights",
            met=base.digest,
            wanted=recipe.base_weights,
            remedy="Hand in the base whose digest the recipe names.",
        )
    out = Path(out_dir)
    if base is not None:
        _check_apart(out, base.folder, "the base")
    with contextlib.ExitStack() as stack:
        experts = [
            stack.enter_context(checkpoints.open_checkpoint(_folder(recipe, position, folders, out)))
            for position in range(len(recipe.experts))
        ]
        plan = _plan(recipe, experts, None if base is None else base.checkpoint)
        _check_memory(recipe, plan, memory_bytes)
        work = _Work(
            recipe,
            plan,
            engine.Settings(block_values=block_values, threads=threads, watch=Watch(silent, cancelled or never)),
            _Told(progress or silent, sum(plan.size(name) for name in plan.floats)),
        )
        out.mkdir(parents=True, exist_ok=True)
        written = _Files(plan, work.dtypes, out)
        try:
            _write(work, written)
            beside = Path(folders[recipe.experts[0].digest]) if base is None else base.folder
            full.copy_beside(beside if beside.is_dir() else beside.parent, out, recipe.output.dtype)
        except BaseException:
            written.discard()
            raise
    work.told.say(1.0)
    values = sum(plan.size(name) for name in plan.floats)
    return Report(
        recipe.method, tuple(sorted(written.places)), plan.floats, plan.tied, plan.copied, values, written.total
    )


def check(recipe: Recipe, *, has_base: bool) -> None:
    """Raise RecipeInvalid when this recipe cannot be carried out on full checkpoints, before one is opened."""
    spec = recipe.spec
    if recipe.output.kind != "full":
        raise RecipeInvalid(
            f"Full checkpoints are merged into a full checkpoint, not into {recipe.output.kind}.",
            pointer="/output/kind",
            met=recipe.output.kind,
            wanted="full",
            remedy="Set output.kind to full.",
        )
    reason = _reason_against(spec)
    if reason:
        raise RecipeInvalid(
            f"{spec.name} cannot merge full checkpoints: {reason}.",
            pointer="/method",
            met=spec.name,
            wanted="a method on dense deltas whose memory does not grow with the model",
            remedy="Choose ties, dare, linear or another element-wise method.",
        )
    if has_base:
        return
    if spec.name not in _WITHOUT_BASE:
        raise RecipeInvalid(
            f"{spec.name} works on deltas, and without the base there are none.",
            pointer="/base_model",
            met="no base weights",
            wanted="the checkpoint that the experts were trained from",
            remedy="Hand in the base, or choose " + ", ".join(_WITHOUT_BASE) + ".",
        )
    whole = math.fsum(expert.weight for expert in recipe.experts)
    if spec.name == "linear" and not recipe.parameters.normalize and abs(whole - 1) > 1e-6:
        raise RecipeInvalid(
            f"The weights sum to {whole:g}, which would make the weights of the model as many times larger.",
            pointer="/experts",
            met=whole,
            wanted="weights whose sum is 1",
            remedy="Set normalize to true, change the weights, or hand in the base.",
        )


def _reason_against(spec: Spec) -> str:
    if spec.needs:
        return f"it needs {' and '.join(spec.needs)} of every expert"
    if spec.form == "factor":
        return "it works on the factors of adapters"
    if spec.form == "ordered":
        return "it keeps every tensor of the merge in memory"
    if spec.form == "whole" and spec.name not in _WHOLE:
        return "it works on adapters"
    return ""


def bytes_needed(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Memory a merge of tensors of these numbers of values takes beside the interpreter; an upper estimate."""
    experts, largest = len(recipe.experts), max(sizes, default=0)
    needed = _FIXED_BYTES + 24 * experts * max(1 << 16, (1 << 19) // experts)
    if not _is_local(recipe.spec, recipe.parameters):
        # Values near a cut are gathered, with their places, out of all values of an expert.
        needed += 2 * sum(sizes)
    if recipe.spec.form == "core":
        return needed + (24 * experts + 40) * largest
    # SCE ranks variances and NuSLERP takes products of rows in float64; where values are cut, those near the cut are
    # gathered.
    return needed + (40 if recipe.method in {"sce", "nuslerp"} else 16) * largest


def _check_memory(recipe: Recipe, plan: "_Plan", memory_bytes: int | None) -> None:
    needed = bytes_needed(recipe, [plan.size(name) for name in plan.floats])
    if memory_bytes is not None and needed > memory_bytes:
        raise RecipeInvalid(
            f"This merge needs about {needed >> 20} MiB and may use {memory_bytes >> 20} MiB.",
            pointer="/method",
            met=needed,
            wanted=memory_bytes,
            remedy="Use linear or ties, which keep one merged tensor in memory, or a larger machine.",
        )


def _folder(recipe: Recipe, position: int, folders: Mapping[str, str | Path], out: Path) -> Path:
    expert = recipe.experts[position]
    given = folders.get(expert.digest)
    if given is None:
        raise ExpertsIncompatible(
            f"The checkpoint of {expert.expert} was not handed in.",
            pointer=f"/experts/{position}",
            met="nothing",
            wanted=expert.digest,
            remedy="Hand in one folder per digest of the recipe.",
        )
    _check_apart(out, Path(given), expert.expert)
    return Path(given)


def _check_apart(out: Path, given: Path, label: str) -> None:
    """Raise RecipeInvalid when the merge would be written over what it is made from."""
    if out.exists() and out.samefile(given if given.is_dir() else given.parent):
        raise RecipeInvalid(
            f"The merge would be written over {label}.",
            pointer="/output",
            met=out.name,
            wanted="a folder that holds neither the base nor an expert",
            remedy="Write to another folder.",
        )


@dataclass(frozen=True)
class _Model:
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
        return self.shape(name) == self.shape(other) and _are_equal(self, name, self, other)


@dataclass(frozen=True)
class _Plan:
    """What becomes of every name: merged, the same as another one that is merged, or copied."""

    reference: _Model
    base: _Model | None
    experts: tuple[_Model, ...]
    floats: tuple[str, ...]
    tied: Mapping[str, str]
    copied: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reference.shape(name)

    def size(self, name: str) -> int:
        return math.prod(self.shape(name))


def _plan(recipe: Recipe, experts: Sequence[Checkpoint], base: Checkpoint | None) -> _Plan:
    """Check that all checkpoints hold the same tensors, and sort them. Raises ExpertsIncompatible."""
    labels = [expert.expert for expert in recipe.experts]
    reference = _Model(labels[0], experts[0]) if base is None else _Model("the base", base)
    models = tuple(
        _resolved(_Model(label, checkpoint), reference, position)
        for position, (label, checkpoint) in enumerate(zip(labels, experts, strict=True))
    )
    floats, copied = [], []
    for name in reference.checkpoint.names:
        _check_shapes(name, reference, models)
        if reference.dtype(name) in _FLOATS:
            floats.append(name)
        else:
            copied.append(name)
            _check_equal(name, reference, models)
    empty = [name for name in floats if 0 in reference.shape(name)]
    floats = [name for name in floats if name not in empty]
    everyone = models if base is None else (reference, *models)
    tied = _tied(floats, everyone)
    return _Plan(
        reference,
        None if base is None else reference,
        models,
        tuple(name for name in floats if name not in tied),
        tied,
        tuple(sorted([*copied, *empty])),
    )


def _resolved(model: _Model, reference: _Model, position: int) -> _Model:
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
    return _Model(model.label, has, own)


def _check_shapes(name: str, reference: _Model, models: Sequence[_Model]) -> None:
    wanted = reference.shape(name)
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
        is_float = reference.dtype(name) in _FLOATS
        if (model.dtype(name) in _FLOATS) != is_float or (not is_float and model.dtype(name) != reference.dtype(name)):
            _differ(
                f"{name} is {model.dtype(name)} in {model.label} and {reference.dtype(name)} in {reference.label}",
                position,
                met=model.dtype(name),
                wanted=reference.dtype(name),
            )


def _check_equal(name: str, reference: _Model, models: Sequence[_Model]) -> None:
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


def _tied(names: Sequence[str], models: Sequence[_Model]) -> dict[str, str]:
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


def _are_equal(model: _Model, name: str, other: _Model, other_name: str) -> bool:
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


class _Base:
    """The base in float32; every thread keeps the stretch it read last, which all experts need one after the other."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._last = threading.local()

    def read(self, name: str, start: int, stop: int) -> Float32:
        """Values start .. stop of a flattened tensor. Raises ExpertsIncompatible where one is not finite."""
        if getattr(self._last, "place", None) != (name, start, stop):
            values = np.empty(stop - start, np.float32)
            file, own = self._model.file(name)
            file.block_into(own, start, values)
            _check_finite(values, self._model.label, name)
            self._last.place, self._last.values = (name, start, stop), values
        found: Float32 = self._last.values
        return found


@dataclass(frozen=True)
class _StoredTensor(Stored):
    """One tensor of an expert less the base's, or as it is where there is no base."""

    model: _Model
    name: str
    base: _Base | None
    is_checked: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.shape(self.name)

    def read(self, start: int, stop: int, *, out: Array) -> Array:
        """Values start .. stop in float32. Raises ExpertsIncompatible where one is not finite, if that is checked."""
        file, own = self.model.file(self.name)
        file.block_into(own, start, out)
        if self.base is not None:
            out -= self.base.read(self.name, start, stop)
        if self.is_checked:
            _check_finite(out, self.model.label, self.name)
        return out


def _check_finite(values: Array, label: str, name: str) -> None:
    if not np.isfinite(values).all():
        raise ExpertsIncompatible(
            f"{label} holds NaN or infinity in {name}.",
            pointer="/experts",
            met="a value that is not finite",
            wanted="finite values",
            remedy=f"Leave {label} out.",
        )


@dataclass
class _Told:
    """Values merged so far, as the share that a listener hears about once per hundredth."""

    listener: Callable[[float], None]
    whole: int
    done: int = 0
    last: float = 0.0

    def within(self, size: int, share: float) -> None:
        """A share of a tensor of `size` values is done, beside those finished."""
        self.say(min(0.99, (self.done + share * size) / max(1, self.whole)))

    def say(self, share: float) -> None:
        if share - self.last >= 0.01 or share == 1.0:
            self.last = share
            self.listener(share)


class _Work:
    """The merged tensors of a plan, one at a time."""

    def __init__(self, recipe: Recipe, plan: _Plan, settings: engine.Settings, told: _Told) -> None:
        self.recipe, self.plan, self.told = recipe, plan, told
        self.dtypes = {name: self._dtype(name) for name in plan.reference.checkpoint.names}
        values = len(recipe.experts) * sum(plan.size(name) for name in plan.floats)
        # Tensor by tensor nothing would seem worth it.
        self._settings = replace(settings, compiled=True) if values >= compiled.WORTH_IT else settings
        self._base = None if plan.base is None else _Base(plan.base)
        self._running: Iterator[tuple[str, Any]] | None = None

    def _dtype(self, name: str) -> str:
        """What a tensor is written in: weights as asked for, else as the reference has them."""
        own, asked = self.plan.reference.dtype(name), self.recipe.output.dtype
        return DTYPES[asked] if asked and own in _FLOATS else own

    def merged(self, name: str) -> Float32:
        """The merged delta of one tensor; names are asked for in sorted order."""
        if _is_local(self.recipe.spec, self.recipe.parameters):
            size = self.plan.size(name)
            _, delta = next(self._engine([name], partial(self.told.within, size)))
            self.told.done += size
        else:
            if self._running is None:
                self._running = self._engine(self.plan.floats, partial(self.told.within, self.told.whole))
            found, delta = next(self._running)
            assert found == name, "tensors are written in the order in which they are merged"
        return np.asarray(delta, dtype=np.float32)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Base and merged delta in the dtype that is written."""
        delta, dtype = self.merged(name).reshape(-1), self.dtypes[name]
        for start in range(0, delta.size, _WRITTEN_VALUES):
            part = delta[start : start + _WRITTEN_VALUES]
            base = None if self._base is None else self._base.read(name, start, start + part.size)
            summed = rounded_sum(base, part, dtype)
            if summed is None:
                self._check_experts(name, start, start + part.size)
                raise ExpertsIncompatible(
                    f"The merge of {name} by {self.recipe.method} is not finite in {dtype}.",
                    pointer="/output/dtype" if np.isfinite(part).all() else "/experts",
                    met="NaN or infinity",
                    wanted="finite values",
                    remedy="Use smaller weights or a smaller scale, or write bfloat16 or float32.",
                )
            yield summed.tobytes()

    def _check_experts(self, name: str, start: int, stop: int) -> None:
        """Raise ExpertsIncompatible, naming the expert, where one is not finite in this stretch."""
        for model in self.plan.experts:
            _StoredTensor(model, name, None).read(start, stop, out=np.empty(stop - start, np.float32))

    def _engine(self, names: Sequence[str], progress: Callable[[float], None]) -> Iterator[tuple[str, Any]]:
        plan = self.plan
        shapes = {name: plan.shape(name) for name in names}
        # A sum shows by itself that a value was not finite; it is enough to look for whose then.
        is_checked = self.recipe.method not in _SUMS
        sources = [
            Source(
                expert.digest,
                expert.weight,
                {name: _StoredTensor(model, name, self._base, is_checked) for name in names},
                label=expert.expert,
                shapes=shapes,
            )
            for expert, model in zip(self.recipe.experts, plan.experts, strict=True)
        ]
        watch = Watch(progress, self._settings.watch.cancelled)
        settings, recipe = replace(self._settings, watch=watch), self.recipe
        return engine.merge(recipe.spec, sources, recipe.parameters, seed=recipe.seed, settings=settings)


def _is_local(spec: Spec, parameters: Parameters) -> bool:
    """Whether a tensor's merge depends on that tensor alone, so that each can be finished before the next is read."""
    scope = parameters.get("scope")
    ranks_all = scope == "global" or (scope is None and parameters.get("variant") == "release")
    return not ranks_all and spec.name not in _ACROSS


def rounded_sum(base: Float32 | None, delta: Float32, dtype: str) -> Array | None:
    """base + delta rounded once, to nearest and ties to even, to F32, F16 or BF16 (as bits); None when not finite.

    A float32 sum rounded again to bfloat16 would go wrong where the first rounding lands on the middle between two.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore", invalid="ignore"):
            wide = np.float64 if dtype == "F16" else np.float32
            found = (delta if base is None else np.add(base, delta, dtype=wide)).astype(files.NUMPY[dtype])
        return found if np.isfinite(found).all() else None
    with np.errstate(over="ignore", invalid="ignore"):
        summed = delta.copy() if base is None else base + delta
    bits = summed.view(np.uint32)
    if base is not None:
        middle = np.flatnonzero(summed.view("<u2")[::2] == np.uint16(0x8000))
        _settle(summed, bits, base, delta, middle)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = summed.view("<u2")[1::2]
    # An exponent of ones is infinity or NaN. NaN of a full payload would be carried past it, into the sign.
    is_finite = np.isfinite(delta).all() and (rounded & np.uint16(0x7F80) != np.uint16(0x7F80)).all()
    return rounded if is_finite else None


def _settle(summed: Float32, bits: Array, base: Float32, delta: Float32, middle: Array) -> None:
    """Move float32 sums that lie on the middle between two bfloat16 to the side where the exact sum lies."""
    if middle.size:
        high, a, b = summed[middle], base[middle], delta[middle]
        part = high - a
        # What the sum has lost, exactly (Knuth's two-sum).
        lost = (a - (high - part)) + (b - part)
        away = np.sign(lost) * np.sign(high)
        bits[middle] = (bits[middle].astype(np.int64) + away.astype(np.int64)).astype(np.uint32)


class _Files:
    """The files of a merge, cut as the reference is, with the room of every tensor set aside before the first one."""

    def __init__(self, plan: _Plan, dtypes: Mapping[str, str], out: Path) -> None:
        homes: dict[str, list[str]] = {}
        for name in plan.reference.checkpoint.names:
            homes.setdefault(plan.reference.checkpoint.file_of(name).path.name, []).append(name)
        self.places = {file if len(homes) > 1 else checkpoints.WEIGHTS_FILE: names for file, names in homes.items()}
        self.total = sum(plan.size(name) * ITEM_BYTES[dtypes[name]] for name in dtypes)
        self._out = out
        self._homes: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        try:
            for file, names in self.places.items():
                self._set_aside(file, {name: (dtypes[name], plan.shape(name)) for name in names})
        except BaseException:
            self.discard()
            raise

    def _set_aside(self, file: str, claims: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        head, starts = files.plan(claims, {"format": "pt"})
        descriptor = os.open(self._out / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._descriptors.append(descriptor)
        # A disk that is too small is met now and not after hours.
        size = len(head) + sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in claims.values())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        self._homes.update({name: (descriptor, start) for name, start in starts.items()})
        _pwrite(descriptor, head, 0)

    def put(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write one tensor to its place."""
        descriptor, at = self._homes[name]
        for block in blocks:
            _pwrite(descriptor, block, at)
            at += len(block)

    def stored(self, name: str, count: int) -> Iterator[bytes]:
        """The bytes of a tensor of `count` bytes that was put before."""
        descriptor, at = self._homes[name]
        end = at + count
        while at < end:
            block = os.pread(descriptor, min(end - at, _COMPARED_BYTES), at)
            yield block
            at += len(block)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def write_index(self) -> None:
        """The index of shards, where there are several."""
        if len(self.places) > 1:
            homes = {name: file for file, names in self.places.items() for name in names}
            record = {"metadata": {"total_size": self.total}, "weight_map": homes}
            text = json.dumps(record, indent=2, sort_keys=True) + "\n"
            (self._out / checkpoints.INDEX_FILE).write_text(text, encoding="utf-8")

    def discard(self) -> None:
        """Take back what was written."""
        self.close()
        for file in (*self.places, checkpoints.INDEX_FILE):
            (self._out / file).unlink(missing_ok=True)


def _pwrite(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def _write(work: "_Work", written: _Files) -> None:
    """Write all tensors, the merged ones in the order in which they are merged."""
    plan = work.plan
    for name in plan.floats:
        written.put(name, work.blocks(name))
    for name, first in plan.tied.items():
        written.put(name, written.stored(first, plan.size(name) * ITEM_BYTES[work.dtypes[name]]))
    for name in plan.copied:
        file, own = plan.reference.file(name)
        written.put(name, files.raw_blocks(file, own))
    written.write_index()
    written.close()
