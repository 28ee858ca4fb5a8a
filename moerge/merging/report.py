"""What a merge did: ranks, norms and energy per module, warnings, and what it was computed with."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import threadpoolctl

import moerge
from moerge.merging import cost
from moerge.merging.ranks import Spectrum, rank_for
from moerge.merging.recipe import Recipe

# Below this share of the squared norm a merge no longer stands for the delta it was made from.
ENERGY_WANTED = 0.9
# A row and a page stay small; whoever wants every module can measure it from the files.
MOST_MODULES_TOLD = 500


@dataclass(frozen=True)
class ModuleReport:
    """What became of one tensor of a merge: the rank it needed (None where it has none), its norm, the share of its
    squared norm kept, who did not have it.
    """

    name: str
    rank: int | None
    norm: float
    energy_kept: float
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a merge did. `energy_kept` is the share of the merged delta's squared Frobenius norm that its rank keeps.

    `kept` are tensors of the base that were taken over from one expert as they are, with its name. `environment` is
    what equal bytes depend on beside the recipe.
    """

    method: str
    kind: str
    rank: int | None
    energy_kept: float
    modules: tuple[ModuleReport, ...]
    warnings: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Module -> experts that do not have it, for modules that are not in all of them."""
        return {module.name: module.missing for module in self.modules if module.missing}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; of more than 500 modules those that kept the least, in the order of names."""
        worst = sorted(self.modules, key=lambda module: (module.energy_kept, module.name))[:MOST_MODULES_TOLD]
        told = sorted(worst, key=lambda module: module.name)
        return {
            "method": self.method,
            "kind": self.kind,
            "rank": self.rank,
            "energy_kept": self.energy_kept,
            "modules": [{**asdict(module), "missing": list(module.missing)} for module in told],
            "modules_total": len(self.modules),
            "missing": {module.name: list(module.missing) for module in told if module.missing},
            "warnings": list(self.warnings),
            "kept": dict(sorted(self.kept.items())[:MOST_MODULES_TOLD]),
            "environment": dict(self.environment),
        }


@cache
def environment() -> dict[str, str]:
    """What decides about the last bits of a result beside its recipe."""
    blas: dict[str, Any] = next(
        (pool for pool in threadpoolctl.threadpool_info() if pool.get("user_api") == "blas"), {}
    )
    told = [blas.get(part) for part in ("internal_api", "version", "architecture")]
    return {
        "device": f"cpu {platform.machine()}",
        "blas": " ".join(str(part) for part in told if part) or "unknown",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "moerge": moerge.__version__,
    }


def warnings(
    recipe: Recipe, modules: tuple[ModuleReport, ...], spectra: list[Spectrum], *, rank: int | None
) -> tuple[float, tuple[str, ...]]:
    """The share of energy kept over all modules, and what whoever uses the merge should know."""
    whole = float(sum(item.whole for item in spectra))
    share = min(1.0, float(sum(item.kept for item in spectra)) / whole) if whole > 0 else 1.0
    found = []
    if whole == 0:
        found.append("The merged delta is zero: this expert behaves as the base model does.")
    if share < ENERGY_WANTED:
        found.append(
            f"Rank {rank} keeps {share:.1%} of the merged delta's energy, less than {ENERGY_WANTED:.0%}."
            f" {_remedy(spectra)}"
        )
    wanted = recipe.output.energy
    short = [] if wanted is None else [module for module in modules if module.energy_kept < wanted - 1e-6]
    if short:
        least = min(short, key=lambda module: module.energy_kept)
        found.append(
            f"{len(short)} of {len(modules)} modules do not reach the energy of {wanted:g} at rank {rank}, the highest"
            f" tried; {least.name} keeps {least.energy_kept:.1%}. Output delta keeps everything, ternary is small."
        )
    partly = sum(1 for module in modules if module.missing)
    if partly:
        counts = (
            "which leaves them out there" if recipe.parameters.get("missing") == "skip" else "and add nothing there"
        )
        found.append(f"{partly} of {len(modules)} modules are missing in some experts, {counts}.")
    return share, tuple(found)


def _remedy(spectra: list[Spectrum]) -> str:
    """What to ask for instead of a rank that keeps too little."""
    needed, is_exact = rank_for(spectra, ENERGY_WANTED)
    others = "Output delta keeps everything, ternary is small."
    if needed > cost.HIGHEST_ENERGY_RANK:
        says = f"rank {needed}" if is_exact else f"a rank of about {needed} or more, by an estimate,"
        return f"It would take {says} to keep {ENERGY_WANTED:.0%}, too many for a LoRA. {others}"
    if is_exact:
        return f"Rank {needed} would keep {ENERGY_WANTED:.0%}. {others}"
    return f"By an estimate it takes rank {needed} or more to keep {ENERGY_WANTED:.0%}. {others}"
