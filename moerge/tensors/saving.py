"""Write what was merged as a LoRA or an IA3 that stock PEFT loads."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import AdapterInvalid
from moerge.tensors import files
from moerge.tensors.files import Array, Float32
from moerge.tensors.kind import PREFIX, Layout, invalid
from moerge.tensors.targets import of_base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_lora(
    folder: str | Path,
    modules: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    *,
    base_model: str | None,
    dtype: str = "F32",
    extra: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    fan_in_fan_out: bool = False,
    biases: Mapping[str, Float32] | None = None,
    saved: Mapping[str, Float32] | None = None,
) -> None:
    """Write deltas B @ A (module -> (B, A)) as a LoRA that stock PEFT loads with scaling exactly 1.

    B is (d_out, rank), A (rank, d_in). Modules of smaller rank are padded with zeros to the largest, so that
    lora_alpha = r gives scaling 1 everywhere without patterns. `layouts` says which modules are embeddings or
    convolutions, `biases` what is added to the output of some of the modules, `saved` which tensors of the base are
    replaced, by its names for them. `extra` adds fields to the config, such as task_type, but none that changes what
    the adapter does. The same input gives the same bytes. Raises ValueError when shapes do not fit, AdapterInvalid
    when a value does not fit `dtype` (F32, F16 or BF16) or PEFT could not load the parts beside each other.
    """
    if not modules:
        raise ValueError("an adapter needs at least one module")
    if strangers := (biases or {}).keys() - modules.keys():
        raise ValueError(f"{min(strangers)} has a bias and no delta")
    rank = max(1, *(_rank(module, *pair) for module, pair in modules.items()))
    tensors: dict[str, files.Tensor] = {}
    for module, (B, A) in sorted(modules.items()):
        layout = (layouts or {}).get(module, Layout())
        names = ("lora_A.weight", "lora_B.weight")
        if layout.form == "embedding":
            names = ("lora_embedding_A", "lora_embedding_B")
        factors = (_wider(_float32(A), rank - A.shape[0], axis=0), _wider(_float32(B), rank - A.shape[0], axis=1))
        if layout.form == "conv":
            ones = [1] * (len(layout.kernel) - 1)
            factors = (factors[0].reshape(rank, *layout.kernel), factors[1].reshape(-1, rank, *ones))
        for ending, factor in zip(names, factors, strict=True):
            name = f"{PREFIX}{module}.{ending}"
            tensors[name] = _later(name, factor, dtype)
        if biases:
            name = f"{PREFIX}{module}.lora_B.bias"
            tensors[name] = _stored(name, _bias(module, layout, biases, rows=len(B)), dtype)
    targets = sorted({of_base(module) for module in modules})
    replaced = _replaced(saved or {}, frozenset(targets))
    tensors |= {name: _later(name, _float32(values), dtype) for name, values in replaced.tensors.items()}
    config = _config(
        targets, rank, base_model=base_model, fan_in_fan_out=fan_in_fan_out, lora_bias=bool(biases), replaced=replaced
    )
    _write(folder, tensors, {**(extra or {}), **config})


def save_ia3(
    folder: str | Path,
    gains: Mapping[str, Float32],
    *,
    feedforward: Collection[str],
    base_model: str | None,
    dtype: str = "F32",
    extra: Mapping[str, Any] | None = None,
    fan_in_fan_out: bool = False,
    saved: Mapping[str, Float32] | None = None,
) -> None:
    """Write gains (module -> l - 1, flat) as an IA3 that stock PEFT loads.

    `feedforward` are the modules whose inputs are multiplied, `saved` and `extra` as for save_lora. The same input
    gives the same bytes. Raises ValueError without a module, AdapterInvalid when a value does not fit `dtype` or PEFT
    could not load the parts beside each other.
    """
    if not gains:
        raise ValueError("an adapter needs at least one module")
    tensors: dict[str, files.Tensor] = {}
    for module, values in sorted(gains.items()):
        name = f"{PREFIX}{module}.ia3_l"
        shape = (1, -1) if module in feedforward else (-1, 1)
        tensors[name] = _stored(name, (_float32(values) + np.float32(1)).reshape(shape), dtype)
    replaced = _replaced(saved or {}, frozenset(gains))
    if replaced.bias != "none":
        raise _unloadable("An IA3 adapter cannot hold a trained bias of the base", met=min(replaced.tensors))
    tensors |= {name: _stored(name, _float32(values), dtype) for name, values in replaced.tensors.items()}
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": base_model,
        "target_modules": sorted(gains),
        "feedforward_modules": _feedforward(gains, feedforward),
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": replaced.modules,
        "init_ia3_weights": True,
        "inference_mode": True,
    }
    _write(folder, tensors, {**(extra or {}), **config})


def check_lora(
    modules: Collection[str], *, biases: Collection[str], saved: Collection[str], layouts: Mapping[str, Layout]
) -> None:
    """Raise AdapterInvalid, as `save_lora` would, when PEFT could not load such parts beside each other."""
    _replaced(dict.fromkeys(saved, np.empty(0, np.float32)), frozenset(map(of_base, modules)))
    for module in modules if biases else ():
        _check_bias(module, layouts.get(module, Layout()))


@dataclass(frozen=True)
class _Replaced:
    """Tensors of the base that an adapter replaces, by their names in its file, and the settings that say so."""

    tensors: Mapping[str, Float32]
    modules: list[str] | None
    bias: str


def _replaced(saved: Mapping[str, Float32], targets: Collection[str]) -> _Replaced:
    """Whole modules become modules_to_save; a bias that is replaced alone belongs to the setting for biases."""
    owners = {name.rpartition(".")[0] for name in saved if not name.endswith(".bias")}
    if "" in owners:
        raise ValueError("a tensor of the base that lies in no module cannot be replaced")
    modules = sorted(name for name in owners if not any(_lies_in(name, other) for other in owners - {name}))
    for module in modules:
        if inside := [target for target in sorted(targets) if _lies_in(target, module)]:
            raise _unloadable("A module is replaced as a whole and has a delta too", met=inside[0])
    tensors, bias = {}, "none"
    for name, values in saved.items():
        owner, _, parameter = name.rpartition(".")
        if not any(_lies_in(owner, module) for module in modules):
            bias = "lora_only" if owner in targets and bias != "all" else "all"
        # PEFT puts a layer of its own around targets.
        tensors[f"{PREFIX}{owner}.base_layer.{parameter}" if owner in targets else PREFIX + name] = values
    return _Replaced(tensors, modules or None, bias)


def _lies_in(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def _check_bias(module: str, layout: Layout) -> None:
    if layout.form == "embedding":
        raise _unloadable("PEFT cannot load an embedding beside modules with biases of their own", met=module)


def _bias(module: str, layout: Layout, biases: Mapping[str, Float32], *, rows: int) -> Float32:
    _check_bias(module, layout)
    values = _float32(biases[module]) if module in biases else np.zeros(rows, np.float32)
    if values.shape != (rows,):
        raise ValueError(f"{module}: the bias is {values.shape}, wanted ({rows},)")
    return values


def _feedforward(gains: Collection[str], feedforward: Collection[str]) -> list[str] | str:
    """feedforward_modules; as a pattern where PEFT, which takes any end of a name, would find too many by a list."""
    wanted = sorted(set(gains) & set(feedforward))
    if any(module.endswith(tuple(wanted)) for module in set(gains) - set(wanted)):
        return "|".join(re.escape(module) for module in wanted)
    return wanted


def _unloadable(detail: str, *, met: str) -> AdapterInvalid:
    return invalid(detail, pointer=met, met=met, wanted="parts that one adapter of PEFT can hold",
                   remedy="Ask for a dense delta or full weights.")  # fmt: skip


def _write(folder: str | Path, tensors: Mapping[str, files.Tensor], config: Mapping[str, Any]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files.write(folder / WEIGHTS, tensors, {"format": "pt"})
    except BaseException:
        (folder / WEIGHTS).unlink(missing_ok=True)
        raise
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(
    targets: list[str],
    rank: int,
    *,
    base_model: str | None,
    fan_in_fan_out: bool,
    lora_bias: bool,
    replaced: _Replaced,
) -> dict[str, Any]:
    """Every field that takes part in the delta, so that no default of another PEFT version can change it."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "target_modules": targets,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": lora_bias,
        "bias": replaced.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": replaced.modules,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _rank(module: str, B: Array, A: Array) -> int:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{module}: B is {B.shape} and A is {A.shape}, wanted (d_out, rank) and (rank, d_in)")
    return int(A.shape[0])


def _wider(values: Float32, extra: int, *, axis: int) -> Float32:
    """With so many rows or columns of zeros more; no copy where there are none."""
    return np.pad(values, [(0, extra if side == axis else 0) for side in (0, 1)]) if extra else values


def _later(name: str, values: Float32, dtype: str) -> files.Lazy:
    """Rounded when it is written, so that a large adapter does not lie in memory twice."""
    return files.Lazy(dtype, values.shape, lambda: _stored(name, values, dtype))


def _float32(values: Array) -> Float32:
    return np.asarray(values, dtype=np.float32)


def _stored(name: str, factor: Float32, dtype: str) -> files.Array | files.BF16:
    with np.errstate(over="ignore"):
        stored = files.to_dtype(factor, dtype)
    back = files.from_bf16(stored.bits) if isinstance(stored, files.BF16) else stored
    if not np.isfinite(back).all():
        raise invalid("A value does not fit the dtype it is to be saved in", pointer=name,
                      met=float(np.abs(factor).max()), wanted=f"a finite value of {dtype}",
                      remedy="Save as bfloat16 or float32.")  # fmt: skip
    return stored
