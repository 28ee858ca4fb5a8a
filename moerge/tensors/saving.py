"""Write merged deltas as a LoRA that stock PEFT loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
) -> None:
    """Write deltas B @ A (module -> (B, A)) as a LoRA that stock PEFT loads with scaling exactly 1.

    B is (d_out, rank), A (rank, d_in). Modules of smaller rank are padded with zeros to the largest, so that
    lora_alpha = r gives scaling 1 everywhere without patterns. `layouts` says which modules are embeddings or
    convolutions, `extra` adds fields to the config, such as task_type, but none that changes the delta. The same
    input gives the same bytes. Raises ValueError when shapes do not fit, AdapterInvalid when a value does not fit
    `dtype` (F32, F16 or BF16).
    """
    if not modules:
        raise ValueError("an adapter needs at least one module")
    rank = max(1, *(_rank(module, *pair) for module, pair in modules.items()))
    tensors: dict[str, files.Tensor] = {}
    for module, (B, A) in sorted(modules.items()):
        layout = (layouts or {}).get(module, Layout())
        names = ("lora_A.weight", "lora_B.weight")
        if layout.form == "embedding":
            names = ("lora_embedding_A", "lora_embedding_B")
        factors = (
            np.pad(_float32(A), ((0, rank - A.shape[0]), (0, 0))),
            np.pad(_float32(B), ((0, 0), (0, rank - A.shape[0]))),
        )
        if layout.form == "conv":
            ones = [1] * (len(layout.kernel) - 1)
            factors = (factors[0].reshape(rank, *layout.kernel), factors[1].reshape(-1, rank, *ones))
        for ending, factor in zip(names, factors, strict=True):
            name = f"{PREFIX}{module}.{ending}"
            tensors[name] = _stored(name, factor, dtype)
    config = {
        **(extra or {}),
        **_config(
            sorted({of_base(module) for module in modules}), rank, base_model=base_model, fan_in_fan_out=fan_in_fan_out
        ),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(targets: list[str], rank: int, *, base_model: str | None, fan_in_fan_out: bool) -> dict[str, Any]:
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
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": None,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _rank(module: str, B: Array, A: Array) -> int:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{module}: B is {B.shape} and A is {A.shape}, wanted (d_out, rank) and (rank, d_in)")
    return int(A.shape[0])


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
