"""The merged tensors of full checkpoints: deltas read in stretches, merged, added to the base and rounded once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging import compiled, engine
from moerge.merging.full_checkpoints.plan import FLOATS, Model, Plan
from moerge.merging.outputs import DTYPES
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Source, Stored, Watch
from moerge.tensors import files
from moerge.tensors.files import Float32

Array = npt.NDArray[Any]

_SUMS = ("linear", "task_arithmetic")
# Ranked over a whole expert whatever its parameters are.
_ACROSS = ("pcb",)
_WRITTEN_VALUES = 1 << 16


@dataclass
class Told:
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


class Work:
    """The merged tensors of a plan, one at a time."""

    def __init__(self, recipe: Recipe, plan: Plan, settings: engine.Settings, told: Told) -> None:
        self.recipe, self.plan, self.told = recipe, plan, told
        self.dtypes = {name: self._dtype(name) for name in plan.reference.checkpoint.names}
        # Tensor by tensor nothing would seem worth it.
        is_worth_it = len(recipe.experts) * plan.values >= compiled.WORTH_IT
        self._settings = replace(settings, compiled=True) if is_worth_it else settings
        self._base = None if plan.base is None else _Base(plan.base)
        self._running: Iterator[tuple[str, Any]] | None = None

    def _dtype(self, name: str) -> str:
        """What a tensor is written in: weights as asked for, else as the reference has them."""
        own, asked = self.plan.reference.dtype(name), self.recipe.output.dtype
        return DTYPES[asked] if asked and own in FLOATS else own

    def _merged(self, name: str) -> Float32:
        """The merged delta of one tensor; names are asked for in sorted order."""
        if is_local(self.recipe):
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
        delta, dtype = self._merged(name).reshape(-1), self.dtypes[name]
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


def is_local(recipe: Recipe) -> bool:
    """Whether a tensor's merge depends on that tensor alone, so that each can be finished before the next is read."""
    scope, variant = recipe.parameters.get("scope"), recipe.parameters.get("variant")
    ranks_all = scope == "global" or (scope is None and variant == "release")
    return not ranks_all and recipe.method not in _ACROSS


class _Base:
    """The base in float32; every thread keeps the stretch it read last, which all experts need one after the other."""

    def __init__(self, model: Model) -> None:
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

    model: Model
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
