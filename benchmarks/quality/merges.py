"""Merges of experts, original or compressed, applied to the base without a change of rank."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.encoder import Base
from moerge import merging
from moerge.merging import arrays
from moerge.merging.sources import Factors
from moerge.tensors import adapters, config

# A task vector's weight, and what the method takes besides; the same for every expert, tuned on none.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "linear": (0.5, {}),
    "ties": (1.0, {}),
}


def merged(method: str, folders: Sequence[Path], base: Base) -> Any:
    """The base with the merge of the adapters in `folders` added to its weights."""
    weight, parameters = METHODS[method]
    return summed(method, folders, base, weight=weight, parameters=parameters)


def scaled(method: str, folders: Sequence[Path], base: Base, *, scale: float) -> Any:
    """The same by any method, its result times `scale`: 1 is what the method calls a merge of equal experts.

    Every expert has weight 1, so sums add them up and averages do not; a scale of the method itself is 1.
    """
    spec = merging.catalogue()[method]
    names = {item.name for item in spec.parameters}
    parameters = {"scale": 1.0} if "scale" in names else {}
    return summed(method, folders, base, weight=1.0, parameters=parameters, scale=scale)


def summed(
    method: str,
    folders: Sequence[Path],
    base: Base,
    *,
    weight: float,
    parameters: Mapping[str, Any] | None = None,
    scale: float = 1.0,
) -> Any:
    """The base with `scale` times a merge added to its weights, every expert having the same weight."""
    experts = [dict(_adapter(folder).modules) for folder in folders]
    # Names fix the order; the values differ between originals and compressed experts.
    names = [f"{number:04}" for number in range(len(folders))]
    deltas = arrays.merge(
        method, experts, weights=[weight] * len(experts), parameters=parameters, digests=names
    )  # fmt: skip
    model = base.fresh()
    with torch.no_grad():
        for name, delta in deltas.items():
            layer = model.get_submodule(name)
            values = delta.B @ delta.A if isinstance(delta, Factors) else delta
            layer.weight += scale * torch.from_numpy(values).to(layer.weight.dtype)
    return model


def _adapter(folder: Path) -> adapters.Adapter:
    record = config.parse((folder / "adapter_config.json").read_bytes())
    return adapters.load(record, folder / "adapter_model.safetensors")
