"""Carry out a recipe on adapters: read them module by module, merge, truncate to a rank, write one LoRA."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import base, engine, factors
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Cancelled, Delta, Factors, LowRank, Source, Watch, never, silent
from moerge.merging.statistics import Statistics
from moerge.tensors import adapters
from moerge.tensors.adapters import Adapter, Layout

__all__ = ["Cancelled", "ModuleReport", "Report", "bytes_needed", "merge"]

# Below this share of the squared norm a merge no longer stands for the delta it was made from.
ENERGY_WANTED = 0.9
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FIXED_BYTES = 64 << 20
# A delta of larger norm cannot be formed in float32, in which it will be used.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module: its rank, its norm, the share of its squared norm kept, who did not have it."""

    name: str
    rank: int
    norm: float
    energy_kept: float
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a merge did. `energy_kept` is the share of the merged delta's squared Frobenius norm that its rank keeps."""

    method: str
    rank: int
    energy_kept: float
    modules: tuple[ModuleReport, ...]
    warnings: tuple[str, ...]

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Module -> experts that do not have it, for modules that are not in all of them."""
        return {module.name: module.missing for module in self.modules if module.missing}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "missing": {name: list(experts) for name, experts in self.missing.items()}}


def merge(
    recipe: Recipe,
    adapters_by_digest: Mapping[str, Adapter],
    out_dir: str | Path,
    *,
    statistics_by_digest: Mapping[str, Statistics] | None = None,
    memory_bytes: int | None = None,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Report:
    """Merge the recipe's adapters, found by `Expert.digest`, and write adapter_config.json and weights to `out_dir`.

    What a method of group 2 needs is found by `Expert.statistics`.
    `progress` is told the share done, `cancelled` asked whether to stop. Raises ExpertsIncompatible when the adapters
    do not fit together, RecipeInvalid when the output rank or the memory does not fit, Cancelled when told to stop.
    """
    watch = Watch(progress or silent, cancelled or never)
    found = [_adapter(recipe, position, adapters_by_digest) for position in range(len(recipe.experts))]
    layouts: dict[str, Layout] = {}
    sources = [
        Source(
            expert.digest,
            expert.weight,
            _Modules(expert.expert, adapter.modules, layouts),
            label=expert.expert,
            shapes=adapter.facts.shapes,
            statistics=(statistics_by_digest or {}).get(expert.statistics or "", {}),
        )
        for expert, adapter in zip(recipe.experts, found, strict=True)
    ]
    rank = _rank(recipe, found)
    _check_memory(recipe, found, rank=rank, memory_bytes=memory_bytes)
    merged: dict[str, tuple[Any, Any]] = {}
    modules: list[ModuleReport] = []
    energies: list[tuple[float, float]] = []
    settings = engine.Settings(threads=threads, watch=watch)
    for name, result in engine.merge(recipe.spec, sources, recipe.parameters, seed=recipe.seed, settings=settings):
        fitted = _fit(recipe, name, result, rank=rank)
        merged[name] = _padded(fitted.factors, rank)
        energies.append((fitted.kept, fitted.whole))
        absent = tuple(source.label for source in sources if name not in source.tensors)
        modules.append(ModuleReport(name, fitted.factors.rank, math.sqrt(fitted.whole), fitted.share, absent))
    adapters.save_lora(
        Path(out_dir),
        merged,
        base_model=recipe.base_model or found[0].config.base_model_name_or_path,
        dtype=_DTYPES[recipe.output.dtype],
        layouts=layouts,
        fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in found),
    )
    watch.progress(1.0)
    return _report(recipe, tuple(modules), energies, rank=rank)


def bytes_needed(recipe: Recipe, shapes: Mapping[str, tuple[int, int]], *, total_rank: int, rank: int) -> int:
    """Memory a merge takes beside the interpreter, from shapes alone; an upper estimate."""
    experts = len(recipe.experts)
    largest = max((rows * columns for rows, columns in shapes.values()), default=0)
    widest = max((rows + columns for rows, columns in shapes.values()), default=0)
    every = sum(rows + columns for rows, columns in shapes.values())
    written = 4 * rank * every
    if "gram_in" in recipe.spec.needs:
        # The weighted sum of square matrices, its factor, and one of them as it is read.
        written += 4 * 8 * max((columns * columns for _, columns in shapes.values()), default=0)
    if recipe.spec.rank_rule == "dense":
        # The merged delta, and per expert a few copies of one block.
        return FIXED_BYTES + 8 * largest + 24 * experts * (1 << 17) + 16 * widest * 2 * rank + written
    held = every if recipe.spec.form == "ordered" else widest
    return FIXED_BYTES + 6 * 8 * total_rank * held + written


class _Modules(Mapping[str, LowRank]):
    """The modules of one adapter, refusing values that are not finite and layouts that differ between experts."""

    def __init__(self, expert: str, modules: Mapping[str, adapters.LowRank], layouts: dict[str, Layout]) -> None:
        self._expert, self._modules, self._layouts = expert, modules, layouts

    def __getitem__(self, name: str) -> adapters.LowRank:
        found = self._modules[name]
        for factor in (found.A, found.B):
            if not np.isfinite(factor).all():
                raise ExpertsIncompatible(
                    f"{self._expert} holds NaN or infinity in {name}.",
                    pointer="/experts",
                    met="a value that is not finite",
                    wanted="finite values",
                    remedy=f"Leave {self._expert} out.",
                )
        layout = self._layouts.setdefault(name, found.layout)
        if layout != found.layout:
            raise ExpertsIncompatible(
                f"{name} is {found.layout} in {self._expert} and {layout} in another expert.",
                pointer="/experts",
                met=str(found.layout),
                wanted=str(layout),
                remedy="Merge experts of one base model.",
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the module to see whether it is there.
        return name in self._modules


def _adapter(recipe: Recipe, position: int, adapters_by_digest: Mapping[str, Adapter]) -> Adapter:
    expert = recipe.experts[position]
    adapter = adapters_by_digest.get(expert.digest)
    if adapter is None:
        raise ExpertsIncompatible(
            f"The adapter of {expert.expert} was not handed in.",
            pointer=f"/experts/{position}",
            met="nothing",
            wanted=expert.digest,
            remedy="Hand in one adapter per digest of the recipe.",
        )
    first = adapters_by_digest[recipe.experts[0].digest].config.base_model_name_or_path
    mine = adapter.config.base_model_name_or_path
    if recipe.base_model is None and mine != first:
        raise ExpertsIncompatible(
            f"{expert.expert} was trained on {mine}, {recipe.experts[0].expert} on {first}.",
            pointer=f"/experts/{position}",
            met=mine,
            wanted=first,
            remedy="Merge experts of one base model, or name base_model when both names mean the same.",
        )
    return adapter


def _rank(recipe: Recipe, found: list[Adapter]) -> int:
    """The rank of the merged adapter. Raises RecipeInvalid when cat, which keeps every factor, is given too little."""
    ranks, shapes = [adapter.facts.ranks for adapter in found], _shapes(found)
    own = base.output_rank(recipe.spec.rank_rule, ranks, shapes)
    wanted = recipe.output.rank
    if wanted is not None and recipe.spec.rank_rule == "all" and wanted < own:
        raise RecipeInvalid(
            f"{recipe.method} keeps every factor, which takes rank {own}.",
            pointer="/output/rank",
            met=wanted,
            wanted=f"at least {own}, or null",
            remedy="Use svd for a smaller rank.",
        )
    return own if wanted is None else wanted


def _shapes(found: list[Adapter]) -> dict[str, tuple[int, int]]:
    return {name: shape for adapter in found for name, shape in adapter.facts.shapes.items()}


def _check_memory(recipe: Recipe, found: list[Adapter], *, rank: int, memory_bytes: int | None) -> None:
    if memory_bytes is None:
        return
    total = base.output_rank("all", [adapter.facts.ranks for adapter in found], {})
    needed = bytes_needed(recipe, _shapes(found), total_rank=total, rank=rank)
    if needed > memory_bytes:
        raise RecipeInvalid(
            f"This merge needs about {needed >> 20} MiB and may use {memory_bytes >> 20} MiB.",
            pointer="/experts",
            met=needed,
            wanted=memory_bytes,
            remedy="Merge fewer experts, ask for a smaller rank, or use linear or svd, which form no dense delta.",
        )


def _fit(recipe: Recipe, name: str, result: Delta, *, rank: int) -> factors.Truncated:
    """The merged delta of one module at the output rank."""
    # LAPACK may not come back from a matrix that holds infinity, so values are looked at before it sees them.
    if all(np.isfinite(part).all() for part in (result if isinstance(result, Factors) else [result])):
        fitted = factors.fit(result, rank, name=name)
        if math.sqrt(fitted.whole) < _LARGEST:
            return fitted
    raise ExpertsIncompatible(
        f"The merge of {name} by {recipe.method} is not finite.",
        pointer="/experts",
        met="NaN or infinity",
        wanted="finite values",
        remedy="Use smaller weights or a smaller scale.",
    )


def _padded(found: Factors, rank: int) -> tuple[Any, Any]:
    """B and A with zeros up to a rank, so that the size of the file follows from shapes alone."""
    extra = rank - found.rank
    return np.pad(found.B, ((0, 0), (0, extra))), np.pad(found.A, ((0, extra), (0, 0)))


def _report(
    recipe: Recipe, modules: tuple[ModuleReport, ...], energies: list[tuple[float, float]], *, rank: int
) -> Report:
    whole = math.fsum(total for _, total in energies)
    share = min(1.0, math.fsum(kept for kept, _ in energies) / whole) if whole > 0 else 1.0
    warnings = []
    if whole == 0:
        warnings.append("The merged delta is zero: this expert behaves as the base model does.")
    if share < ENERGY_WANTED:
        warnings.append(
            f"Rank {rank} keeps {share:.0%} of the merged delta's energy, less than {ENERGY_WANTED:.0%}."
            " Ask for a higher rank, or use a method whose result is low rank, such as linear."
        )
    partly = sum(1 for module in modules if module.missing)
    if partly:
        counts = (
            "which leaves them out there" if recipe.parameters.get("missing") == "skip" else "and add nothing there"
        )
        warnings.append(f"{partly} of {len(modules)} modules are missing in some experts, {counts}.")
    return Report(recipe.method, rank, share, modules, tuple(warnings))
