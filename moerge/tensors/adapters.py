"""Adapters: a strict config, a cross-check of config and tensors, and deltas per module in one orientation.

The words of PEFT (`lora_alpha`, `target_modules`, key prefixes) stop here: the rest of the library sees modules,
LowRank factors and scalings.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge import table
from moerge.errors import AdapterInvalid
from moerge.tensors import files, kinds, strict
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.kind import PREFIX, AdapterConfig, AdapterFacts, Kind, Layout, LowRank, invalid

__all__ = ["Adapter", "AdapterConfig", "AdapterFacts", "Layout", "LowRank", "check", "load", "parse_config",
           "save_lora", "scan_finite"]  # fmt: skip

CONFIG_BYTES = 256_000


def catalogue() -> dict[str, Kind]:
    """Every kind of adapter, by the peft_type of its config."""
    return {module.SPEC.peft_type: module.SPEC for module in table.load(kinds).values()}


def parse_config(data: bytes) -> AdapterConfig:
    """The bytes of an adapter_config.json as a record. Raises ConfigInvalid."""
    raw = strict.loads(data, max_keys=10_000, max_depth=32)
    targets = raw.get("target_modules")
    return AdapterConfig(
        peft_type=raw["peft_type"],
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        use_rslora=raw.get("use_rslora", False),
        use_dora=raw.get("use_dora", False),
        fan_in_fan_out=raw.get("fan_in_fan_out", False),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
        bias=raw.get("bias", "none"),
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        raw=raw,
    )


def check(config: AdapterConfig, header: Header) -> AdapterFacts:
    """What config and header say together; no tensor byte is read. Raises AdapterInvalid where they disagree."""
    kind = _kind(config)
    roles, saved = _roles(kind, config, header)
    ranks, shapes = kind.check(config, roles) if kind.check else ({}, {})
    return AdapterFacts(
        kind=kind.name,
        modules=tuple(sorted(roles)),
        ranks=ranks,
        rank=max(ranks.values(), default=0),
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in roles})),
        n_parameters=sum(info.size for info in header.tensors.values()),
        shapes=shapes,
        saved=tuple(saved),
        blockers=kind.blockers(config, header),
    )


class Modules(Mapping[str, LowRank]):
    """Module name -> LowRank; each look-up reads that module's tensors, so memory holds one module at a time."""

    def __init__(
        self, config: AdapterConfig, kind: Kind, roles: Mapping[str, Mapping[str, TensorInfo]], path: Path
    ) -> None:
        self._config, self._kind, self._roles, self._path = config, kind, dict(sorted(roles.items())), path

    def __getitem__(self, module: str) -> LowRank:
        tensors = self._roles[module]
        assert self._kind.low_rank is not None
        with files.open_file(self._path) as file:
            return self._kind.low_rank(self._config, file, module, tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk whose deltas can be formed; `modules` reads lazily, sorted by name."""

    config: AdapterConfig
    facts: AdapterFacts
    path: Path
    modules: Modules

    @cached_property
    def digest(self) -> str:
        """SHA-256 over weights and config: equal digests mean equal deltas."""
        weights = files.sha256(self.path)
        config = json.dumps(self.config.raw, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{weights}\n{config}".encode()).hexdigest()


def load(config: AdapterConfig, path: str | Path) -> Adapter:
    """Open an adapter for merging. Raises AdapterInvalid when its deltas cannot be formed, saying why."""
    path = Path(path)
    with files.open_file(path) as file:
        header = file.header
    facts = check(config, header)
    if facts.blockers:
        first = facts.blockers[0]
        raise AdapterInvalid(f"{first.reason}: met {first.met}.", pointer=first.pointer, met=first.met,
                             wanted="an adapter whose delta is B @ A", remedy=first.remedy, rule="T4")  # fmt: skip
    kind = _kind(config)
    return Adapter(config, facts, path, Modules(config, kind, _roles(kind, config, header)[0], path))


def scan_finite(path: str | Path, header: Header) -> tuple[str, ...]:
    """Look at the exponent bits of every value for NaN and infinity; returns warnings. Raises AdapterInvalid."""
    del header
    with files.open_file(path) as file:
        for name in file.names:
            for block in files.float32_blocks(file, name):
                if not np.isfinite(block).all():
                    raise invalid("A tensor holds NaN or infinity", pointer=name, met="a value that is not finite",
                                  wanted="finite values", remedy="Train again; the loss diverged.", rule="T2")  # fmt: skip
    return ()


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

    Modules of smaller rank are padded with zeros to the largest, so that lora_alpha = r gives 1 everywhere.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not modules:
        raise ValueError("an adapter needs at least one module")
    rank = max(max(A.shape[0] for _, A in modules.values()), 1)
    tensors: dict[str, files.Tensor] = {}
    for module, (B, A) in sorted(modules.items()):
        layout = (layouts or {}).get(module, Layout())
        pad = rank - A.shape[0]
        A = np.pad(np.asarray(A, dtype=np.float32), ((0, pad), (0, 0)))
        B = np.pad(np.asarray(B, dtype=np.float32), ((0, 0), (0, pad)))
        if layout.form == "conv":
            A, B = A.reshape(rank, *layout.kernel), B.reshape(*B.shape, *[1] * (len(layout.kernel) - 1))
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if layout.form == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{PREFIX}{module}.{a}"] = files.to_dtype(A, dtype)
        tensors[f"{PREFIX}{module}.{b}"] = files.to_dtype(B, dtype)
    config = {
        **(extra or {}),
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
    }
    files.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _kind(config: AdapterConfig) -> Kind:
    kind = catalogue().get(config.peft_type)
    if kind is None:
        raise invalid("This kind of adapter is not known", pointer="/peft_type", met=config.peft_type,
                      wanted=", ".join(sorted(catalogue())), remedy="Upload an adapter that PEFT can load.")  # fmt: skip
    return kind


def _roles(kind: Kind, config: AdapterConfig, header: Header) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    roles: dict[str, dict[str, TensorInfo]] = {}
    saved = []
    for name, info in header.tensors.items():
        for ending, role in kind.endings.items():
            if name.startswith(PREFIX) and name.endswith(f".{ending}"):
                roles.setdefault(name[len(PREFIX) : -len(ending) - 1], {})[role] = info
                break
        else:
            saved.append(name)
    return roles, sorted(saved)
