"""The vectors that tokens are compared with, by module: from the experts' weights, from beside them, or a pack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moerge.compression.adapters import WEIGHTS_FILE
from moerge.routing import gates, packs, prototypes
from moerge.routing.packs import Pack
from moerge.runtime.errors import GatesMissing
from moerge.runtime.experts import Expert
from moerge.tensors.files import Float32

_GATELESS = "Train gates with `moerge train-gates`, use the strategy arrow, or leave them out with skip_gateless=True."


@dataclass(frozen=True, eq=False)
class Vectors:
    """By module (experts, d_in), and which rows of it are there, (experts,)."""

    rows: Mapping[str, Float32]
    masks: Mapping[str, npt.NDArray[np.bool_]]


def of(kind: str, experts: Sequence[Expert], pack: Pack | None, *, skips_gateless: bool) -> Vectors:
    """The vectors of this kind. Raises GatesMissing, GatesInvalid, PackInvalid, OSError."""
    if kind == packs.ARROW:
        return _directions(experts, pack)
    found = _gates(experts) if pack is None else Vectors(pack.phatgoose, pack.masks[packs.PHATGOOSE])
    if not skips_gateless:
        _check_complete(experts, found)
    return found


def _directions(experts: Sequence[Expert], pack: Pack | None) -> Vectors:
    """Arrow's prototypes; the pack's only where they were made of the very weights at hand."""
    if pack is not None and [one.sha256 for one in pack.members] == [one.sha256 for one in experts]:
        return Vectors(pack.arrow, pack.masks[packs.ARROW])
    found = [prototypes.of_adapter(expert.config, expert.folder / WEIGHTS_FILE) for expert in experts]
    rows, _, masks = packs.of_prototypes(found)
    return Vectors(rows, masks)


def _gates(experts: Sequence[Expert]) -> Vectors:
    """What lies beside the experts' weights."""
    paths = [expert.folder / gates.FILE for expert in experts]
    found = [
        gates.load(path, shapes=expert.facts.shapes)[0] if path.is_file() else {}
        for expert, path in zip(experts, paths, strict=True)
    ]
    return Vectors(*packs.stacked(found))


def _check_complete(experts: Sequence[Expert], found: Vectors) -> None:
    """Every expert has a gate for every module that it adapts."""
    lacking = {
        expert.name: [name for name in expert.facts.shapes if name not in found.masks or not found.masks[name][place]]
        for place, expert in enumerate(experts)
    }
    lacking = {name: modules for name, modules in lacking.items() if modules}
    if not lacking:
        return
    told = "; ".join(f"{name} ({len(modules)} modules, such as {modules[0]})" for name, modules in lacking.items())
    raise GatesMissing(
        f"Routing by gates needs those of every expert, and some have none: {told}.", pointer=", ".join(lacking),
        met="no gates", wanted=f"{gates.FILE} with a gate for every module", remedy=_GATELESS,
    )  # fmt: skip
