"""Mediator: average the layers in which experts agree, and keep those in which they conflict for a router.

Signs conflict at a position when both are among the largest values of the experts there. Layers with the smaller share
of such positions are averaged; the others keep their average as the shared part and of each expert the largest values
of what that leaves. The paper has no public code: the measure of conflict and the share of layers are ours. The weights
of a recipe are the router's gates: D = average + sum_t w_t exclusive_t. A single expert is its own average.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import exclusive, parts, selection
from moerge.merging.base import Parameters, Spec, density, number
from moerge.merging.exclusive import Kept, Sparse, Split
from moerge.merging.sources import Block, Delta, Stream, delta_dtype

Array = npt.NDArray[Any]

SPEC = Spec(
    name="mediator",
    title="Mediator",
    form="whole",
    summary="Layers with few sign conflicts are averaged; in the others each expert's own part is added by its weight.",
    when="A router will pick experts at use, and layers differ in how much the experts conflict.",
    paper="arXiv 2502.04411",
    parameters=(
        density(default=0.1),
        number(
            "averaged",
            default=0.5,
            minimum=0.0,
            maximum=1.0,
            help="Share of layers, those with the fewest conflicts, that are averaged. Layers without any always are.",
        ),
        number(
            "top",
            default=0.2,
            minimum=0.0,
            above=True,
            maximum=1.0,
            help="Share of each tensor's values, the largest, whose signs can conflict.",
        ),
    ),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.\d+(?=\.|$)")


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield the average, as factors where it stands alone, with exclusive parts added by weight."""
    share = 1 / len(stream.sources)
    residual = exclusive.residuals(stream, scale=share)
    cuts = _cuts(residual, _routed(stream, parameters), parameters)
    whole = exclusive.with_shared(residual, stream, scale=share)
    for name in stream.names:
        if (0, name) in cuts:
            yield name, whole.map_blocks(name, lambda block: exclusive.add_trimmed(block, cuts))
        else:
            yield name, exclusive.shared(stream, name, scale=share)


def split(stream: Stream, parameters: Parameters) -> Split:
    """The parts themselves; an averaged layer has empty ones."""
    share = 1 / len(stream.sources)
    residual = exclusive.residuals(stream, scale=share)
    cuts = _cuts(residual, _routed(stream, parameters), parameters)

    def one(name: str, expert: int) -> Kept:
        if (expert, name) in cuts:
            return exclusive.trimmed(residual, cuts, name, expert)
        lost = sum(float(np.square(part, dtype=np.float64).sum()) for _, part in residual.blocks(name, expert))
        empty = np.zeros(0, dtype=delta_dtype(residual.sources[expert].read(name)))
        return Kept(Sparse(stream.shapes[name], np.zeros(0, np.int64), empty), float(np.sqrt(lost)))

    return Split(stream.names, lambda name: exclusive.shared(stream, name, scale=share), one)


def conflicts(stream: Stream, *, top: float) -> dict[str, float]:
    """Layer -> share of positions where experts have both signs among their largest values.

    A tensor whose name holds no layer is a layer of its own.
    """
    cuts = selection.cuts(stream, density=top, scope="tensor")

    def count(block: Block) -> int:
        kept = selection.trim(block, cuts)
        return int(np.count_nonzero((kept > 0).any(axis=0) & (kept < 0).any(axis=0)))

    found: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name in stream.names:
        layer = _layer(name)
        found[layer] = found.get(layer, 0) + sum(value for _, value in stream.over_blocks(name, count))
        sizes[layer] = sizes.get(layer, 0) + stream.size(name)
    return {layer: number / sizes[layer] for layer, number in found.items()}


def _routed(stream: Stream, parameters: Parameters) -> set[str]:
    """The tensors of the layers that are not averaged."""
    found = conflicts(stream, top=parameters.top)
    order = sorted(found, key=lambda layer: (found[layer], layer))
    averaged = int(parameters.averaged * len(order) + parts.ROUNDING)
    layers = {layer for layer in order[averaged:] if found[layer] > 0}
    return {name for name in stream.names if _layer(name) in layers}


def _cuts(residual: Stream, routed: set[str], parameters: Parameters) -> selection.Cuts:
    """Where the exclusive parts of routed tensors are cut."""
    counts = {name: parts.count_kept(parameters.density, residual.size(name)) for name in residual.names}
    # An averaged tensor needs no cut; to keep everything takes no reading.
    found = selection.cuts_at(residual, {n: counts[n] if n in routed else residual.size(n) for n in residual.names})
    return {place: cut for place, cut in found.items() if place[1] in routed}


def _layer(name: str) -> str:
    """The part of a tensor's name up to the number of its layer, or all of it."""
    found = _LAYER.search(name)
    return name[: found.end()] if found else name
