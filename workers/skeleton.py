"""The architecture that an adapter belongs to, without a single weight, and what stock PEFT makes of the adapter there.

Imports torch and peft, so only workers.selfcheck imports this, inside a job.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import safetensors
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from moerge.merging.experts import Place
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Factors
from moerge.tensors import files
from moerge.tensors.adapters import Adapter, Layout
from moerge.tensors.bases import BaseWeights
from moerge.tensors.places import of_base_tensor
from registry.services.bases import pattern_of
from workers.selfcheck import Outcome, Sample, Taken, demand, demand_close, demand_same, failure, relative_error

Array = npt.NDArray[Any]

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = "default"
_INSIDE = ".base_layer"
_WRAPPED = (".modules_to_save.", ".original_module.")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LOADING = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)
# Of a delta so many values are formed at a time, in float64.
_VALUES = 1 << 21
# What torch says when the memory of a job is used up; workers.runner tells it as that.
_NO_MEMORY = "can't allocate memory"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Modules of a base by name, as (d_out, d_in) with their layout, and the tensors that adapters bring whole."""

    shapes: Mapping[str, tuple[int, int]]
    layouts: Mapping[str, Layout]
    saved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    has_biases: bool = False  # the adapter adds biases, so its layers have some
    is_turned: bool = False  # linear layers store their weight as (d_in, d_out)

    @classmethod
    def of(
        cls, adapters: Sequence[Adapter], base_shapes: Mapping[str, Sequence[int]], sample: Sample
    ) -> "Architecture":
        """What adapters say of their base, and the modules that the base is known to have in the same layers.

        Shapes and biases that only the base's weights tell are those that the sample has heard of.
        """
        merged = {place.name: (shape[0], shape[1]) for place, shape in sample.shapes.items() if place.role == "module"}
        shapes: dict[str, tuple[int, int]] = {}
        layouts: dict[str, Layout] = {}
        saved: dict[str, tuple[int, ...]] = {}
        for adapter in adapters:
            facts = adapter.facts
            shapes |= facts.shapes
            layouts |= facts.layouts
            layouts |= {
                name: adapter.modules[name].layout for name in merged if name not in layouts and name in adapter.modules
            }
            for module, length in facts.gains.items():
                # The other side of the layer takes no part in IA3.
                shapes.setdefault(module, (1, length) if module in facts.feedforward else (length, 1))
            with files.open_file(adapter.path) as file:
                whole = {of_base_tensor(name): file.info(name).shape for name in (*facts.saved, *facts.biases)}
            saved |= {name: whole[name] for name in adapter.saved}
        shapes |= merged
        return cls(
            shapes={**dict(_others(shapes, base_shapes)), **shapes},
            layouts=layouts,
            has_biases=bool(sample.named("bias")),
            saved=saved,
            is_turned=any(adapter.config.fan_in_fan_out for adapter in adapters),
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The modules, whose weights take no memory: PEFT brings an adapter to the device and dtype of its layer, so
        they are one value each, seen as a whole matrix. Tensors that the adapter replaces stay on the meta device.
        """
        root = nn.Module()
        with torch.device("meta"):
            for name, shape in sorted(self.shapes.items()):
                if _INSIDE not in name:
                    _put(root, name, self._module(name, shape))
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                seen = torch.zeros(1, dtype=dtype).expand(parameter.shape)
                module.register_parameter(name, nn.Parameter(seen, requires_grad=False))
        with torch.device("meta"):
            for name, whole in sorted(self.saved.items()):
                module, _, tensor = name.rpartition(".")
                owner = _owner(root, module)
                if getattr(owner, tensor, None) is None:
                    owner.register_parameter(tensor, nn.Parameter(torch.empty(whole)))
        return root

    def _module(self, name: str, shape: tuple[int, int]) -> nn.Module:
        rows, columns = shape
        layout = self.layouts.get(name, Layout())
        if any(inner.startswith(f"{name}{_INSIDE}.") for inner in self.shapes):
            return nn.MultiheadAttention(columns, 1)
        if layout.form == "embedding":
            return nn.Embedding(columns, rows)
        if layout.form == "conv":
            channels, *kernel = layout.kernel
            return _CONVOLUTIONS[len(kernel)](channels, rows, tuple(kernel), bias=self.has_biases)
        if self.is_turned:
            return Conv1D(rows, columns)
        return nn.Linear(columns, rows, bias=self.has_biases)


def check(
    folder: Path, *, recipe: Recipe, sample: Sample, architecture: Architecture, base: BaseWeights | None
) -> Outcome:
    """Load the adapter in `folder` and compare it with what was computed. Raises MergeSelfCheckFailed."""
    dtype = _DTYPES[recipe.output.dtype or "float32"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(
                architecture.build(dtype),
                str(folder),
                low_cpu_mem_usage=True,
                # Values are compared as they are stored, and a copy in float32 would take memory.
                autocast_adapter_dtype=False,
                torch_device="cpu",
            )
        except (*_LOADING, safetensors.SafetensorError) as error:
            if _NO_MEMORY in str(error):
                raise
            raise failure(
                "PEFT does not load the result.", pointer=WEIGHTS, met=str(error)[:500], wanted="an adapter"
            ) from error
    complaints = [str(one.message)[:500] for one in said if issubclass(one.category, UserWarning)]
    demand(not complaints, "PEFT warns of the result.", pointer=WEIGHTS, met=complaints[:3], wanted="no warning")
    with warnings.catch_warnings():
        # PEFT takes biases of its own for pieces of matrices.
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_names(folder, state, sample)
    layers = {name.removeprefix(_PREFIX): module for name, module in model.named_modules()}
    errors = [
        demand_close(_error(place, taken, layers, state, architecture, base=base, dtype=dtype), place.key)
        for place, taken in sorted(sample.taken.items(), key=lambda item: item[0].key)
    ]
    versions = {"peft": peft.__version__, "torch": str(torch.__version__)}
    return Outcome(sum(place.role in {"module", "gain"} for place in sample.taken), max(errors, default=0.0), versions)


def _check_names(folder: Path, state: Mapping[str, torch.Tensor], sample: Sample) -> None:
    """The file holds what PEFT would save of the model, no more and no less, and every tensor that was merged."""
    with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
        met = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    wanted = {name: list(values.shape) for name, values in state.items()}
    # Of biases that a saved module has PEFT names copies too, and does without them.
    copies = {name for name in wanted if any(part in name for part in _WRAPPED)} - met.keys()
    demand_same(met, {name: shape for name, shape in wanted.items() if name not in copies}, file=WEIGHTS)
    merged = {*sample.named("module"), *sample.named("gain")}
    loaded = {name.rpartition(".lora_")[0] or name.rpartition(".ia3_")[0] for name in met} - {""}
    demand_same(dict.fromkeys(sorted(name.removeprefix(_PREFIX) for name in loaded), "loaded"),
                dict.fromkeys(sorted(merged), "loaded"), file=WEIGHTS)  # fmt: skip
    replaced = {of_base_tensor(name) for name in met}
    for name in sample.named("saved"):
        demand(name in replaced, f"{WEIGHTS} lacks {name}.", pointer=name, met=None, wanted="the tensor")


def _error(
    place: Place,
    taken: Taken,
    layers: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    architecture: Architecture,
    *,
    base: BaseWeights | None,
    dtype: torch.dtype,
) -> float:
    """How far what was loaded lies from what was computed and rounded once to the dtype of the file."""
    if place.role == "module":
        assert isinstance(taken.delta, Factors), "a LoRA's modules are told as factors"
        layout = architecture.layouts.get(place.name, Layout())
        is_turned = layout.form == "embedding" or (layout.form == "linear" and architecture.is_turned)
        return _delta_error(layers[place.name], taken.delta, layout, is_turned=is_turned, dtype=dtype)
    if place.role == "bias":
        layer = layers[place.name]
        found = layer.lora_B[_NAME].bias.double() * layer.scaling[_NAME]
        own: Array | float = 0.0
    elif place.role == "gain":
        found, own = layers[place.name].ia3_l[_NAME].double().flatten(), 1.0
    else:
        found = next(values for name, values in state.items() if of_base_tensor(name) == place.name).double()
        known = None if base is None else base.tensor(place.name)
        assert known is not None, "changes are taken from a tensor that the base has"
        own = _rows(known, taken)
    computed = torch.from_numpy((own + np.asarray(taken.delta)).astype(np.float32)).to(dtype).double()
    return relative_error(_rows(found.numpy(), taken), computed.numpy())


def _rows(values: Array, taken: Taken) -> Array:
    return values.reshape(taken.shape[0], -1)[taken.rows]


def _delta_error(layer: Any, factors: Factors, layout: Layout, *, is_turned: bool, dtype: torch.dtype) -> float:
    """PEFT's own delta of a layer against B @ A, some columns at a time, both in float64."""
    B, A = (torch.from_numpy(np.asarray(part, dtype=np.float32)).to(dtype).double() for part in factors)
    is_embedding = layout.form == "embedding"
    loaded = layer.lora_embedding_A[_NAME] if is_embedding else layer.lora_A[_NAME].weight
    other = layer.lora_embedding_B if is_embedding else layer.lora_B[_NAME]
    if is_embedding:
        other[_NAME] = _frozen(other[_NAME])
    else:
        other.weight = _frozen(other.weight)
    # A kernel is cut by its channels, each of which is so many columns.
    width = A.shape[1] // loaded.shape[1]
    step = max(1, _VALUES // (B.shape[0] * width))
    difference = size = 0.0
    for start in range(0, loaded.shape[1], step):
        part = _frozen(loaded[:, start : start + step])
        if is_embedding:
            layer.lora_embedding_A[_NAME] = part
        else:
            layer.lora_A[_NAME].weight = part
        found = layer.get_delta_weight(_NAME)
        found = found.T if is_turned else found.reshape(B.shape[0], -1)
        wanted = B @ A[:, start * width : (start + step) * width]
        difference += float((found - wanted).square().sum())
        size += float(wanted.square().sum())
    return math.sqrt(difference / size) if size else math.inf if difference else 0.0


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().double(), requires_grad=False)


def _others(
    shapes: Mapping[str, tuple[int, int]], base_shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Known modules of the base in the layers that the adapters touch: a target that matches too much meets them."""
    layers = {found[0] for name in shapes if (found := re.match(r".*\.\d+(?=\.)", name))}
    for pattern, shape in base_shapes.items():
        head, star, rest = pattern.rpartition("*.")
        for layer in layers if star else ():
            if f".{pattern_of(layer)}".endswith(f".{head}*"):
                yield f"{layer}.{rest}", (int(shape[0]), int(shape[1]))


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    _owner(root, parent).add_module(last, module)


def _owner(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, with whatever lies between made on the way."""
    for part in path.split(".") if path else ():
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
