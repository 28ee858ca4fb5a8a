"""Before a merge becomes ready: the result is loaded as its readers will, and compared with what was computed.

An adapter is loaded by stock PEFT on a skeleton of the architecture without weights (workers.skeleton); what is dense
is reopened by the reference safetensors library. torch and peft are imported inside the check only, never by a process
that forks.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.compression import reader
from moerge.merging.experts import Place
from moerge.merging.outputs import DTYPES, TERNARY_FILE
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Delta, Factors
from moerge.tensors.adapters import Adapter, Layout
from moerge.tensors.bases import BaseWeights
from moerge.tensors.files import BF16, from_bf16
from moerge.tensors.header import WEIGHT_DTYPES as FLOATS
from moerge.tensors.targets import of_base
from registry.errors import Fault, MergeSelfCheckFailed

Array = npt.NDArray[Any]

MOST_SAMPLED = 8
TOLERANCE = 1e-5
# Of a dense delta these many rows are remembered.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Taken:
    """What the engine computed for one tensor: factors, or some rows of a dense one flattened to (rows, width)."""

    shape: tuple[int, ...]
    delta: Delta
    rows: npt.NDArray[np.int64] | None = None


@dataclass(eq=False)
class Sample:
    """Hears every merged tensor, and remembers those of each role whose hash with the recipe's digest is smallest."""

    digest: str
    shapes: dict[Place, tuple[int, ...]] = field(default_factory=dict)
    taken: dict[Place, Taken] = field(default_factory=dict)

    def __call__(self, place: Place, delta: Delta) -> None:
        """`moerge.merging.run.merge` calls this as `observe`."""
        self.shapes[place] = tuple(delta.shape)
        kept = sorted([place, *(one for one in self.taken if one.role == place.role)], key=self._order)
        for one in kept[MOST_SAMPLED:]:
            self.taken.pop(one, None)
        if place in kept[:MOST_SAMPLED]:
            self.taken[place] = _taken(delta)

    def named(self, role: str) -> list[str]:
        """Names of all tensors of a role."""
        return [place.name for place in self.shapes if place.role == role]

    def _order(self, place: Place) -> bytes:
        return hashlib.sha256(f"{self.digest}\n{place.key}".encode()).digest()


@dataclass(frozen=True)
class Outcome:
    """What a check found: the versions that loaded the result, how many tensors were compared, the largest error."""

    count: int
    largest_relative_error: float
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": "passed",
            "modules": self.count,
            "largest_relative_error": self.largest_relative_error,
            **self.versions,
        }


def check(
    folder: Path,
    *,
    recipe: Recipe,
    sample: Sample,
    adapters: Sequence[Adapter],
    base: BaseWeights | None = None,
    base_shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Load the result in `folder` and compare it with the sample; returns what the report says of it.

    `base_shapes` are known modules of the base by pattern, beside those of the adapters. Raises MergeSelfCheckFailed.
    """
    if recipe.output.kind in {"lora", "ia3"}:
        from workers import skeleton  # noqa: PLC0415 - takes seconds, and never in the parent that forks

        architecture = skeleton.Architecture.of(adapters, base_shapes or {}, sample)
        return skeleton.check(folder, recipe=recipe, sample=sample, architecture=architecture, base=base).as_dict()
    if recipe.output.kind == "ternary":
        return _check_ternary(folder, sample=sample, adapters=adapters, base=base).as_dict()
    return _check_dense(folder, recipe=recipe, sample=sample, adapters=adapters, base=base).as_dict()


def relative_error(met: Array, wanted: Array) -> float:
    """Frobenius norm of the difference over that of what is wanted; infinite where nothing was wanted."""
    difference = float(np.linalg.norm(met.astype(np.float64) - wanted))
    size = float(np.linalg.norm(wanted))
    return difference / size if size else math.inf if difference else 0.0


def failure(detail: str, *, pointer: str, met: object, wanted: object) -> MergeSelfCheckFailed:
    """What is raised where a result is not as it should be."""
    remedy = "Nothing was published. Ask for the merge again; if it fails again, tell the operator."
    return MergeSelfCheckFailed(detail, faults=[Fault(pointer, met, wanted, remedy)])


def demand(is_right: bool, detail: str, *, pointer: str, met: object, wanted: object) -> None:  # noqa: FBT001
    """Raise MergeSelfCheckFailed unless something is as it should be."""
    if not is_right:
        raise failure(detail, pointer=pointer, met=met, wanted=wanted)


def demand_close(error: float, name: str) -> float:
    """Raise MergeSelfCheckFailed where a tensor that was loaded is not what was computed."""
    demand(
        error <= TOLERANCE,
        f"What {name} loads as is not what was computed.",
        pointer=name,
        met=f"a relative error of {error:.3g}",
        wanted=f"at most {TOLERANCE:g}",
    )
    return error


def demand_same(met: Mapping[str, object], wanted: Mapping[str, object], *, file: str) -> None:
    """Raise MergeSelfCheckFailed, naming the first tensor, where names or what they stand for differ."""
    for name in sorted(met.keys() | wanted.keys()):
        is_there = "has another" if name in wanted else "holds an unexpected"
        demand(
            met.get(name) == wanted.get(name),
            f"{file} {is_there if name in met else 'lacks'} {name}.",
            pointer=name,
            met=met.get(name),
            wanted=wanted.get(name),
        )


def _taken(delta: Delta) -> Taken:
    if isinstance(delta, Factors):
        return Taken(delta.shape, delta)
    shape = tuple(delta.shape)
    flat = np.asarray(delta).reshape(shape[0], -1)
    rows = np.unique(np.linspace(0, shape[0] - 1, _ROWS).astype(np.int64))
    return Taken(shape, flat[rows].copy(), rows)


def _check_dense(
    folder: Path, *, recipe: Recipe, sample: Sample, adapters: Sequence[Adapter], base: BaseWeights | None
) -> Outcome:
    """A task vector or a checkpoint: every tensor has the name and dtype that was promised, the sample the values."""
    import safetensors  # noqa: PLC0415
    import torch  # noqa: PLC0415

    lies = _Lies(sample, adapters, base)
    dtype = DTYPES.get(recipe.output.dtype or ("" if recipe.output.kind == "full" else "float32"))
    wanted = dict.fromkeys(lies.names, dtype)
    if recipe.output.kind == "full":
        assert base is not None, "a full merge has been made with it"
        wanted = {name: _promised(base.checkpoint.info(name).dtype, dtype) for name in base.names}
    met: dict[str, str] = {}
    errors: list[float] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                met[name] = file.get_slice(name).get_dtype()
                for place in lies.sampled(name):
                    taken = sample.taken[place]
                    found = file.get_tensor(name)
                    own = lies.of_base(place) if recipe.output.kind == "full" else np.float32(0)
                    computed = torch.from_numpy(own + _values(taken)).to(found.dtype).to(torch.float64).numpy()
                    rows = lies.canonical(place, found.to(torch.float32).numpy())
                    errors.append(demand_close(relative_error(rows, computed), name))
    demand_same(met, wanted, file="The result")
    return Outcome(len(errors), max(errors, default=0.0), {"safetensors": safetensors.__version__})


def _check_ternary(folder: Path, *, sample: Sample, adapters: Sequence[Adapter], base: BaseWeights | None) -> Outcome:
    """An encoded task vector: whole by its own rules, with the tensors promised, the signs those that were computed."""
    lies = _Lies(sample, adapters, base)
    count = 0
    with reader.open_encoded(folder / TERNARY_FILE) as encoded:
        encoded.verify()
        known = dict.fromkeys([*encoded.entries, *encoded.plain], "a tensor")
        demand_same(known, dict.fromkeys(lies.names, "a tensor"), file=TERNARY_FILE)
        for name in sorted(encoded.entries):
            for place in lies.sampled(name):
                found = encoded.tensor(name)
                rows = lies.canonical(place, from_bf16(found.bits) if isinstance(found, BF16) else found)
                is_wrong = (rows != 0) & (np.sign(rows) != np.sign(_values(sample.taken[place])))
                demand(
                    not is_wrong.any(),
                    f"Signs of {name} are not what was computed.",
                    pointer=name,
                    met=int(is_wrong.sum()),
                    wanted=0,
                )
                count += 1
    return Outcome(count, 0.0, {})


class _Lies:
    """How merged tensors lie in a dense result: under which name of the base, and which way round."""

    def __init__(self, sample: Sample, adapters: Sequence[Adapter], base: BaseWeights | None) -> None:
        self._sample, self._base = sample, base
        self._layouts = {name: layout for one in adapters for name, layout in one.facts.layouts.items()}
        self._is_turned = any(one.config.fan_in_fan_out for one in adapters)
        self._names = {place: self._name(place.role, place.name) for place in sample.shapes}
        replaced = {self._name("saved", name) for one in adapters for name in one.saved}
        self.names = sorted({*self._names.values(), *replaced})

    def sampled(self, name: str) -> list[Place]:
        """What the sample has of a tensor of the result."""
        return [place for place in self._sample.taken if self._names[place] == name]

    def of_base(self, place: Place) -> Array:
        """The sampled rows of the base's own tensor."""
        assert self._base is not None
        own = self._base.tensor(self._names[place])
        assert own is not None, "the name was found in the base"
        return self.canonical(place, own)

    def canonical(self, place: Place, stored: Array) -> Array:
        """The sampled rows of a tensor as the base stores it."""
        taken = self._sample.taken[place]
        layout = self._layouts.get(place.name, Layout())
        if place.role == "module" and layout.form == "linear":
            is_square = taken.shape[0] == taken.shape[1]
            stored = stored.T if (self._is_turned if is_square else stored.shape != taken.shape) else stored
        elif place.role == "module":
            stored = layout.canonical(stored)
        flat = stored.reshape(taken.shape[0], -1)
        return flat if taken.rows is None else flat[taken.rows]

    def _name(self, role: str, name: str) -> str:
        module = of_base(name)
        endings = {"module": [".weight", ".in_proj_weight"], "bias": [".bias"]}.get(role, [""])
        wanted = [f"{module}{ending}" if ending else name for ending in endings]
        found = [self._base.find(one) for one in wanted] if self._base is not None else []
        return next((one for one in found if one is not None), wanted[0])


def _values(taken: Taken) -> Array:
    """The sampled rows as the engine computed them, rounded once to float32."""
    dense = taken.delta.delta() if isinstance(taken.delta, Factors) else np.asarray(taken.delta)
    return np.asarray(dense, dtype=np.float32)


def _promised(in_base: str, asked: str | None) -> str:
    """The dtype of a tensor in a full checkpoint: integers stay what they are."""
    return asked if asked and in_base in FLOATS else in_base
