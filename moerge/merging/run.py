"""Carry out a recipe on adapters: read them module by module, merge, and write what the recipe asks for."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from moerge.errors import RecipeInvalid
from moerge.merging import cost, engine, experts, report
from moerge.merging.cost import Cost
from moerge.merging.experts import ACCEPTED, Brought, Place
from moerge.merging.full import FullWriter
from moerge.merging.outputs import DELTA_FILE, TERNARY_FILE, DeltaWriter, Ia3Writer, LoraWriter, Writer
from moerge.merging.recipe import Recipe
from moerge.merging.report import ModuleReport, Report
from moerge.merging.sources import Cancelled, Delta, Watch, never, silent
from moerge.merging.statistics import Statistics
from moerge.tensors.adapters import Adapter, BaseWeights

__all__ = ["ACCEPTED", "DELTA_FILE", "TERNARY_FILE", "Cancelled", "ModuleReport", "Report", "merge"]


def merge(
    recipe: Recipe,
    adapters_by_digest: Mapping[str, Adapter],
    out_dir: str | Path,
    *,
    base: BaseWeights | None = None,
    statistics_by_digest: Mapping[str, Statistics] | None = None,
    memory_bytes: int | None = None,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    observe: Callable[[Place, Delta], None] | None = None,
) -> Report:
    """Merge the recipe's adapters, found by `Expert.digest`, and write the result to `out_dir`.

    That is an adapter (`adapter_config.json` and weights) for lora and ia3, `delta.safetensors` for delta and for
    ternary, whose encoding is a codec's, and a checkpoint for full. `base` are the base's weights where the result
    depends on them; what a method of group 2 needs is found by `Expert.statistics`. `progress` is told the share done,
    `cancelled` asked whether to stop; `observe` hears every merged tensor as it was computed, before it is rounded and
    laid out: a LoRA's module as the factors of its rank. Raises ExpertsIncompatible when the adapters do not fit
    together, RecipeInvalid when the output rank or the memory does not fit, Cancelled when told to stop; `out_dir` then
    holds nothing new.
    """
    watch = Watch(progress or silent, cancelled or never)
    with ExitStack() as opened:
        brought = experts.gather(
            recipe, adapters_by_digest, base=base, statistics_by_digest=statistics_by_digest or {}, opened=opened
        )
        needed = _cost(recipe, brought, base)
        check_rank(recipe, brought)
        _check_memory(needed, memory_bytes)
        writer = _writer(recipe, brought, Path(out_dir), base=base, rank=needed.rank or 0, watch=watch)
        try:
            modules, spectra = [], []
            settings = engine.Settings(threads=threads, watch=watch)
            merged = engine.merge(recipe.spec, brought.sources, recipe.parameters, seed=recipe.seed, settings=settings)
            for name, delta in merged:
                place = brought.places[name]
                energy, rank = writer.put(place, delta)
                if observe is not None:
                    observe(place, writer.modules.get(name, delta) if isinstance(writer, LoraWriter) else delta)
                absent = tuple(source.label for source in brought.sources if name not in source.tensors)
                modules.append(ModuleReport(name, rank, math.sqrt(energy.whole), energy.share, absent))
                spectra.append(energy)
            writer.finish()
        except BaseException:
            writer.discard()
            raise
    watch.progress(1.0)
    rank = writer.rank if isinstance(writer, LoraWriter) else None
    share, warnings = report.warnings(recipe, tuple(modules), spectra, rank=rank)
    return Report(
        method=recipe.method,
        kind=recipe.output.kind,
        rank=rank,
        energy_kept=share,
        modules=tuple(modules),
        warnings=warnings,
        kept={name: one.expert for name, one in brought.kept.items()},
        environment=report.environment(),
    )


def _cost(recipe: Recipe, brought: Brought, base: BaseWeights | None) -> Cost:
    base_bytes = base.checkpoint.file_bytes if base is not None else 0
    return cost.estimate(recipe.spec, recipe.output, brought.sizes, saved=brought.saved, base_bytes=base_bytes)


def _writer(
    recipe: Recipe, brought: Brought, folder: Path, *, base: BaseWeights | None, rank: int, watch: Watch
) -> Writer:
    if recipe.output.kind == "lora":
        return LoraWriter(recipe, brought, folder, base=base, rank=rank)
    if recipe.output.kind == "ia3":
        return Ia3Writer(recipe, brought, folder, base=base)
    if recipe.output.kind == "full":
        assert base is not None, "asked for when the experts were gathered"
        return FullWriter(recipe, brought, folder, base=base, watch=watch.step)
    return DeltaWriter(recipe, brought, folder, base=base)


def check_rank(recipe: Recipe, brought: Brought) -> None:
    """Raise RecipeInvalid when cat, which keeps every factor, is given too little."""
    if recipe.output.kind != "lora" or recipe.spec.rank_rule != "all":
        return
    own = max(cost.total_ranks(brought.sizes).values(), default=1)
    if recipe.output.energy is not None or (recipe.output.rank is not None and recipe.output.rank < own):
        raise RecipeInvalid(
            f"{recipe.method} keeps every factor, which takes rank {own}.",
            pointer="/output/rank",
            met=recipe.output.rank if recipe.output.energy is None else {"energy": recipe.output.energy},
            wanted=f"at least {own}, or null",
            remedy="Use svd for a smaller rank, or linear for a share of energy.",
        )


def _check_memory(needed: Cost, memory_bytes: int | None) -> None:
    if memory_bytes is not None and needed.memory_bytes > memory_bytes:
        raise RecipeInvalid(
            f"This merge needs about {needed.memory_bytes >> 20} MiB and may use {memory_bytes >> 20} MiB.",
            pointer="/experts",
            met=needed.memory_bytes,
            wanted=memory_bytes,
            remedy="Merge fewer experts, ask for a smaller rank, or use linear or svd, which form no dense delta.",
        )
