"""What a merge is written as: an adapter that stock PEFT loads, a dense task vector, or the base with it added.

Whatever grows with the model is written tensor by tensor to the place where it will lie.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from moerge.errors import ExpertsIncompatible
from moerge.merging import factors, ranks
from moerge.merging.experts import Brought, Place
from moerge.merging.ranks import Spectrum
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Array, Delta, Factors
from moerge.tensors import files, saving
from moerge.tensors.adapters import BaseWeights, Layout
from moerge.tensors.files import Float32
from moerge.tensors.targets import of_base

DELTA_FILE, TERNARY_FILE, DELTA_RECORD = "delta.safetensors", "delta.compeft", "delta.json"
_ROLES = ("module", "bias", "saved")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# A delta of larger norm cannot be formed in float32, in which it will be used.
_LARGEST = float(np.finfo(np.float32).max)


class Writer(Protocol):
    """Takes the merged tensors one by one."""

    def put(self, place: Place, delta: Delta) -> tuple[Spectrum, int | None]:
        """Take one tensor; returns its energy, and the rank it needs where it has one."""

    def finish(self) -> None:
        """Write what is left."""

    def discard(self) -> None:
        """Take back what was written."""


class LoraWriter:
    """A LoRA; all modules are held until the last, because the largest rank decides about the file."""

    def __init__(self, recipe: Recipe, brought: Brought, folder: Path, *, base: BaseWeights | None, rank: int) -> None:
        self._recipe, self._brought, self._folder, self._base, self._rank = recipe, brought, folder, base, rank
        named = {role: [place.name for place in brought.places.values() if place.role == role] for role in _ROLES}
        saving.check_lora(
            named["module"],
            biases=named["bias"],
            saved=[*named["saved"], *brought.kept],
            layouts=brought.layouts,
        )
        self.modules: dict[str, Factors] = {}
        self._biases: dict[str, Float32] = {}
        self._saved: dict[str, Float32] = {}

    @property
    def rank(self) -> int:
        """Of the file: what was asked for, or the largest that a module needs for its share of energy."""
        if self._recipe.output.energy is None:
            return self._rank
        return max((A.shape[0] for _, A in self.modules.values()), default=1)

    def put(self, place: Place, delta: Delta) -> tuple[Spectrum, int | None]:
        check_finite(self._recipe, place, delta)
        if place.role == "module":
            found = ranks.fit(delta, rank=self._rank, energy=self._recipe.output.energy, name=place.name)
            check_norm(self._recipe, place, found.whole)
            self.modules[place.name] = found.factors
            return Spectrum.of(found), found.factors.rank
        values = as_float32(delta)
        if place.role == "bias":
            self._biases[place.name] = values
        else:
            self._saved[place.name] = replaced(self._base, place.name, values)
        return whole_of(values), None

    def finish(self) -> None:
        kept = {name: one.values() for name, one in self._brought.kept.items()}
        # One module of the file's rank is enough: the others are padded to it as they are written.
        name, (B, A) = next(iter(self.modules.items()))
        extra = self.rank - A.shape[0]
        self.modules[name] = Factors(np.pad(B, ((0, 0), (0, extra))), np.pad(A, ((0, extra), (0, 0))))
        saving.save_lora(
            self._folder,
            self.modules,
            base_model=self._brought.base_model,
            dtype=DTYPES[self._recipe.output.dtype or "float32"],
            layouts=self._brought.layouts,
            fan_in_fan_out=self._brought.fan_in_fan_out,
            biases=self._biases,
            saved={**self._saved, **kept},
        )

    def discard(self) -> None:
        pass


class Ia3Writer:
    """IA3: what was merged are gains less one, what is written are the gains."""

    def __init__(self, recipe: Recipe, brought: Brought, folder: Path, *, base: BaseWeights | None) -> None:
        self._recipe, self._brought, self._folder, self._base = recipe, brought, folder, base
        self._gains: dict[str, Float32] = {}
        self._saved: dict[str, Float32] = {}

    def put(self, place: Place, delta: Delta) -> tuple[Spectrum, int | None]:
        check_finite(self._recipe, place, delta)
        values = as_float32(delta)
        if place.role == "gain":
            self._gains[place.name] = values
        else:
            self._saved[place.name] = replaced(self._base, place.name, values)
        return whole_of(values), None

    def finish(self) -> None:
        kept = {name: one.values() for name, one in self._brought.kept.items()}
        saving.save_ia3(
            self._folder,
            self._gains,
            base_model=self._brought.base_model,
            dtype=DTYPES[self._recipe.output.dtype or "float32"],
            feedforward=self._brought.feedforward,
            fan_in_fan_out=self._brought.fan_in_fan_out,
            saved={**self._saved, **kept},
        )

    def discard(self) -> None:
        pass


class Slots:
    """A safetensors file whose tensors are written one by one, in any order, each to its place."""

    def __init__(
        self, path: Path, claims: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        head, self._places = files.plan(claims, metadata)
        self.claims = claims
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(head, 0)

    def put(self, name: str, values: Float32) -> None:
        """Write one tensor, rounded once to its dtype."""
        dtype, shape = self.claims[name]
        if values.shape != shape:
            raise ValueError(f"{name} was announced with shape {shape} and came with {values.shape}")
        made = rounded(name, values, dtype)
        stored = made.bits if isinstance(made, files.BF16) else made
        self._write(np.ascontiguousarray(stored, dtype=files.NUMPY[dtype]).tobytes(), self._places[name])

    def pour(self, name: str, source: files.SafetensorsFile) -> None:
        """Copy the stored bytes of one tensor from another file."""
        at = self._places[name]
        for block in files.raw_blocks(source, name):
            self._write(block, at)
            at += len(block)

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count


class DeltaWriter:
    """The dense task vector: what is to be added to tensors of the base, in one file, under the base's names."""

    def __init__(self, recipe: Recipe, brought: Brought, folder: Path, *, base: BaseWeights | None) -> None:
        self._recipe, self._brought, self._folder, self._base = recipe, brought, folder, base
        self._targets = Targets(brought, base)
        for name, one in brought.kept.items():
            self._targets.add_kept(name, one.shape)
        dtype = DTYPES[recipe.output.dtype or "float32"]
        claims = {name: (dtype, shape) for name, shape in self._targets.shapes.items()}
        folder.mkdir(parents=True, exist_ok=True)
        self._slots = Slots(folder / DELTA_FILE, claims, {"format": "pt", "recipe": recipe.digest})

    def put(self, place: Place, delta: Delta) -> tuple[Spectrum, int | None]:
        check_finite(self._recipe, place, delta)
        values = as_float32(delta)
        check_finite(self._recipe, place, values)
        name = self._targets.names[place.key]
        self._slots.put(name, self._targets.stored(place, values))
        return whole_of(values), None

    def finish(self) -> None:
        for name, one in self._brought.kept.items():
            assert self._base is not None
            own = self._base.tensor(name)
            assert own is not None
            self._slots.put(self._targets.names[f"{name} (kept)"], one.values() - own)
        self._slots.close()
        is_ternary = self._recipe.output.kind == "ternary"
        record = {
            "format": "ternary task vector, compeft/1" if is_ternary else "dense task vector",
            "base_model": self._brought.base_model,
            "base_weights": self._recipe.base_weights,
            "recipe_digest": self._recipe.digest,
            "method": self._recipe.method,
            "file": TERNARY_FILE if is_ternary else DELTA_FILE,
            "dtype": self._recipe.output.dtype,
            "tensors": len(self._slots.claims),
            "apply": (f"Decode it: moerge decompress {TERNARY_FILE}. " if is_ternary else "")
            + "Add each tensor to the tensor of the same name of the base model, in float32, and round once.",
        }
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (self._folder / DELTA_RECORD).write_text(text, encoding="utf-8")

    def discard(self) -> None:
        self._slots.close()
        for name in (DELTA_FILE, DELTA_RECORD):
            (self._folder / name).unlink(missing_ok=True)


class Targets:
    """Which tensor of the base each merged tensor belongs to, and how it lies there."""

    def __init__(self, brought: Brought, base: BaseWeights | None) -> None:
        self._brought, self._base = brought, base
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        sizes = {name: shape for source in brought.sources for name, shape in (source.shapes or {}).items()}
        for key, place in brought.places.items():
            self._add(key, place, sizes[key])

    def stored(self, place: Place, values: Float32) -> Float32:
        """A merged tensor shaped as the base stores it."""
        if place.role != "module":
            return values
        layout = self._brought.layouts.get(place.name, Layout())
        shape = self.shapes[self.names[place.key]]
        turned = layout.stored(values, fan_in_fan_out=self._is_turned(place.name, layout, shape))
        return np.ascontiguousarray(turned)

    def add_kept(self, name: str, shape: tuple[int, ...]) -> None:
        """A tensor that one expert replaces: what is added is its own less the base's."""
        found = None if self._base is None else self._base.find(name)
        in_base = () if found is None or self._base is None else tuple(self._base.checkpoint.info(found).shape)
        if found is None or in_base != shape:
            raise ExpertsIncompatible(
                f"{self._brought.kept[name].expert} replaces {name} of the base, and what it adds to it is not known.",
                pointer="/output/kind",
                met=f"shape {list(shape)}, in the base {list(in_base)}" if found else "no such tensor of the base",
                wanted="the same tensor in the base's weights",
                remedy="Ask for output lora, which keeps the tensor as it is.",
            )
        self._claim(f"{name} (kept)", found, shape)

    def _add(self, key: str, place: Place, shape: tuple[int, ...]) -> None:
        name = of_base(place.name) if ".base_layer" in place.name else place.name
        wanted = {"module": [f"{name}.weight", f"{name}.in_proj_weight"], "bias": [f"{name}.bias"]}.get(
            place.role, [name]
        )
        found = wanted[0]
        if self._base is not None:
            known = [one for one in map(self._base.find, wanted) if one is not None]
            if not known:
                raise self._absent(place, wanted[0])
            found = known[0]
        if place.role != "module":
            self._claim(key, found, shape)
            return
        layout = self._brought.layouts.get(place.name, Layout())
        shape = layout.stored(np.empty(shape, dtype=np.bool_), fan_in_fan_out=False).shape
        if self._base is not None:
            in_base = tuple(self._base.checkpoint.info(found).shape)
            if in_base != shape and not (layout.form == "linear" and in_base == shape[::-1]):
                raise self._unfit(place, found, shape, in_base)
            self._claim(key, found, in_base)
            return
        self._claim(key, found, shape[::-1] if layout.form == "linear" and self._brought.fan_in_fan_out else shape)

    def _is_turned(self, module: str, layout: Layout, stored: tuple[int, ...]) -> bool:
        """Whether the base stores a linear layer as (d_in, d_out); for square ones the adapters' configs decide."""
        rows, columns = self._brought.shapes[module]
        if layout.form != "linear" or rows == columns:
            return self._brought.fan_in_fan_out
        return stored == (columns, rows)

    def _claim(self, key: str, name: str, shape: tuple[int, ...]) -> None:
        if name in self.shapes:
            raise ExpertsIncompatible(
                f"Two tensors of the experts belong to {name} of the base.",
                pointer="/experts",
                met=key,
                wanted="one",
                remedy="Leave one of them out, or ask for output lora.",
            )
        self.names[key], self.shapes[name] = name, shape

    def _absent(self, place: Place, name: str) -> ExpertsIncompatible:
        owners = [str(source) for source in self._brought.sources if place.key in source.tensors]
        return ExpertsIncompatible(
            f"{owners[0]} changes {name}, which the base's weights do not have.",
            pointer="/output/kind",
            met=name,
            wanted="a tensor of the base",
            remedy="Ask for output lora, or hand in the weights of the model that the experts were trained on.",
        )

    def _unfit(self, place: Place, name: str, shape: tuple[int, ...], in_base: tuple[int, ...]) -> ExpertsIncompatible:
        owners = [str(source) for source in self._brought.sources if place.key in source.tensors]
        return ExpertsIncompatible(
            f"{name} has shape {list(shape)} in {owners[0]} and {list(in_base)} in the base.",
            pointer="/experts",
            met=list(shape),
            wanted=list(in_base),
            remedy="Merge experts that were trained on this base model and vocabulary.",
        )


def whole_of(values: Array) -> Spectrum:
    """The energy of a tensor that is kept as it is."""
    whole = factors.square_norm(np.atleast_2d(values))
    return Spectrum(whole, whole, 0, np.empty(0))


def as_float32(delta: Delta) -> Float32:
    """A merged tensor as an array."""
    return np.asarray(factors.dense(delta), dtype=np.float32)


def replaced(base: BaseWeights | None, name: str, change: Float32) -> Float32:
    """The base's tensor with a change added."""
    own = None if base is None else base.tensor(name)
    assert own is not None, "changes are taken from a tensor that the base has"
    return own + change


def rounded(name: str, values: Float32, dtype: str) -> Array | files.BF16:
    """Values in the dtype they are stored in. Raises ExpertsIncompatible when one does not fit."""
    with np.errstate(over="ignore"):
        made = files.to_dtype(values, dtype)
    back = files.from_bf16(made.bits) if isinstance(made, files.BF16) else made
    if not np.isfinite(back).all():
        raise ExpertsIncompatible(
            f"A value of {name} does not fit {dtype}.",
            pointer="/output/dtype",
            met=float(np.abs(values).max()),
            wanted=f"a finite value of {dtype}",
            remedy="Ask for bfloat16 or float32.",
        )
    return made


def check_finite(recipe: Recipe, place: Place, delta: Delta) -> None:
    """Raise ExpertsIncompatible when a merged tensor is not finite; LAPACK may not come back from infinity."""
    if not all(np.isfinite(part).all() for part in (delta if isinstance(delta, Factors) else [delta])):
        raise _not_finite(recipe, place)


def check_norm(recipe: Recipe, place: Place, whole: float) -> None:
    """Raise ExpertsIncompatible when a delta in factors cannot be formed in float32."""
    if not math.sqrt(whole) < _LARGEST:
        raise _not_finite(recipe, place)


def _not_finite(recipe: Recipe, place: Place) -> ExpertsIncompatible:
    return ExpertsIncompatible(
        f"The merge of {place.key} by {recipe.method} is not finite.",
        pointer="/experts",
        met="NaN or infinity",
        wanted="finite values",
        remedy="Use smaller weights or a smaller scale.",
    )
