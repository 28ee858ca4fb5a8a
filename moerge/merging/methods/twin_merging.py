"""Twin-Merging: what experts share, and of each what the shared part leaves, compressed; a router adds the latter.

shared = scale * sum_t D_t, exclusive_t = the largest values or the leading directions of D_t - shared. The weights of a
recipe are the router's gates: D = shared + sum_t w_t exclusive_t. Tensors that are not matrices are not compressed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import exclusive, factors, noise, parts, selection
from moerge.merging.base import Parameters, Spec, choice, density, integer, scale
from moerge.merging.exclusive import Kept, Split
from moerge.merging.sources import Delta, Factors, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="twin_merging",
    title="Twin-Merging",
    form="whole",
    summary="A shared part, and per expert a compressed exclusive part that is added by the expert's weight.",
    when="A router will pick experts at use, and a shared part with small exclusive ones is to be kept.",
    paper="arXiv 2406.15479",
    parameters=(
        choice(
            "compress",
            ["magnitude", "svd"],
            default="magnitude",
            help="Keep the largest values of an exclusive part, or its leading directions.",
        ),
        density(),
        integer(
            "directions",
            default=None,
            minimum=1,
            maximum=4096,
            help="Directions that svd keeps. Null: density times the shorter side of the matrix.",
        ),
        scale(default=0.3),
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield the shared part with the exclusive ones added by weight; factors stay factors with svd."""
    residual = exclusive.residuals(stream, scale=parameters.scale)
    cuts = _cuts(residual, parameters)
    whole = exclusive.with_shared(residual, stream, scale=parameters.scale)
    for name in stream.names:
        if _is_by_direction(stream, name, parameters):
            yield name, _by_directions(stream, name, parameters)
        else:
            yield name, whole.map_blocks(name, lambda block: exclusive.add_trimmed(block, cuts))


def split(stream: Stream, parameters: Parameters) -> Split:
    """The parts themselves."""
    residual = exclusive.residuals(stream, scale=parameters.scale)
    cuts = _cuts(residual, parameters)

    def one(name: str, expert: int) -> Kept:
        if not _is_by_direction(stream, name, parameters):
            return exclusive.trimmed(residual, cuts, name, expert)
        found = _truncated(residual.sources[expert].read(name), _count(stream, name, parameters), name)
        return Kept(found.factors, float(np.sqrt(max(0.0, found.whole - found.kept))))

    return Split(stream.names, lambda name: exclusive.shared(stream, name, scale=parameters.scale), one)


def _cuts(residual: Stream, parameters: Parameters) -> selection.Cuts:
    """Where exclusive parts are cut by magnitude; what is no matrix is kept whole."""
    counts = {
        name: parts.count_kept(parameters.density, residual.size(name))
        if len(residual.shapes[name]) == 2 and parameters.compress == "magnitude"
        else residual.size(name)
        for name in residual.names
    }
    return selection.cuts_at(residual, counts)


def _is_by_direction(stream: Stream, name: str, parameters: Parameters) -> bool:
    return bool(parameters.compress == "svd") and len(stream.shapes[name]) == 2


def _count(stream: Stream, name: str, parameters: Parameters) -> int:
    given: int | None = parameters.directions
    return given or parts.count_kept(parameters.density, min(stream.shapes[name]))


def _truncated(delta: Delta, count: int, name: str) -> factors.Truncated:
    if isinstance(delta, Factors):
        return factors.truncate(delta, count)
    return factors.truncate_dense(delta, count, key=noise.key(0, "twin_merging", name))


def _by_directions(stream: Stream, name: str, parameters: Parameters) -> Delta:
    """One matrix, on the cores of the experts' factors, or dense where an expert has none."""
    deltas, count = stream.deltas(name), _count(stream, name, parameters)
    low = [delta if isinstance(delta, Factors) else None for delta in deltas]
    if all(isinstance(delta, Factors) for delta in deltas if delta is not None):
        held = factors.cores(low)
        common = parameters.scale * held.cores.sum(axis=0)
        merged = common.copy()
        for core, weight in zip(held.cores, stream.weights, strict=True):
            U, S, Vt = np.linalg.svd(core - common, full_matrices=False)
            merged += weight * ((U[:, :count] * S[:count]) @ Vt[:count])
        return held.expand(merged)
    residual = exclusive.residuals(stream, scale=parameters.scale)
    total = factors.dense(exclusive.shared(stream, name, scale=parameters.scale)).astype(np.float64)
    for source, weight in zip(residual.sources, stream.weights, strict=True):
        total += weight * _truncated(source.read(name), count, name).factors.delta()
    return total
