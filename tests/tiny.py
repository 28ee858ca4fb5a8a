"""Real adapters of some KB, seeded: what PEFT would write, made with numpy."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from moerge.tensors import files

BASE = "sentence-transformers/all-MiniLM-L6-v2"
QUERY = "encoder.layer.0.attention.self.query"
VALUE = "encoder.layer.0.attention.self.value"
SHAPES = {QUERY: (384, 384), VALUE: (384, 384)}


def config(**changes: Any) -> bytes:
    """An adapter_config.json of a LoRA of rank 2; a value of `...` removes a field."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["query", "value"],
        "task_type": "FEATURE_EXTRACTION",
    }
    fields |= changes
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


def tensors(*, rank: int = 2, shapes: dict[str, tuple[int, int]] = SHAPES, seed: int = 0) -> dict[str, np.ndarray]:
    """Factors A and B of every module under PEFT's names; shapes are (out, in)."""
    rng = np.random.default_rng(seed)
    found = {}
    for module, (out, inside) in shapes.items():
        found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, inside)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    return found


def weights(**choices: Any) -> bytes:
    """The bytes of an adapter_model.safetensors."""
    return dump(tensors(**choices))


def dump(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of a safetensors file."""
    stream = io.BytesIO()
    files.dump(stream, arrays, {"format": "pt"})
    return stream.getvalue()


def card(description: str = "Sorts questions about tea by the kind of tea.", **front: Any) -> bytes:
    """A README.md with five example inputs."""
    fields = {
        "license": "apache-2.0",
        "base_model": BASE,
        "tags": ["tea", "lora"],
        "moerge": {"task": description, "examples": [f"Is tea number {n} a green one?" for n in range(5)]},
        **front,
    }
    # JSON is YAML.
    return f"---\n{json.dumps(fields)}\n---\n\n# Tea\n\nAbout tea.\n".encode()


def lora(
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: float = 4,
    modules: Sequence[str] = (QUERY,),
    base: str = BASE,
    size: int = 384,
    task: str = "Tells which account a bank customer means.",
) -> dict[str, bytes]:
    """The files of a LoRA on square layers by path, the weights written by the safetensors library, not by ours."""
    noise = np.random.default_rng(seed)
    arrays = {}
    for module in modules:
        arrays[f"base_model.model.{module}.lora_A.weight"] = noise.normal(size=(rank, size)).astype(np.float32)
        arrays[f"base_model.model.{module}.lora_B.weight"] = noise.normal(size=(size, rank)).astype(np.float32) / 50
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return {
        "README.md": card(task, base_model=base),
        "adapter_config.json": config(base_model_name_or_path=base, r=rank, lora_alpha=alpha, target_modules=targets),
        "adapter_model.safetensors": save(arrays, metadata={"format": "pt"}),
    }


def write(tree: dict[str, bytes], folder: Path) -> Path:
    """Files as a folder, as PEFT's `save_pretrained` leaves it."""
    for path, data in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def adapter(seed: int = 0, **changes: bytes) -> dict[str, bytes]:
    """The files of a complete adapter by path."""
    return {
        "adapter_config.json": config(),
        "adapter_model.safetensors": weights(seed=seed),
        "README.md": card(),
        **changes,
    }


def fitting(shapes: dict[str, tuple[int, int]], *, seed: int = 0, **changes: Any) -> dict[str, bytes]:
    """Config and weights for modules of these shapes."""
    targets = sorted({module.rsplit(".", 1)[-1] for module in shapes})
    return {
        "adapter_config.json": config(target_modules=targets, **changes),
        "adapter_model.safetensors": weights(shapes=shapes, seed=seed),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
