"""1bit-Merging: what experts share, and of each the sign of what the shared part leaves, with one scale per tensor.

The scale is the mean magnitude, which no other scale of a sign code beats in the least squares sense, and a zero counts
as plus (BitDelta, arXiv 2402.10193). A recipe's weights are the router's gates: D = shared + sum_t w_t exclusive_t. The
kind of module that carries the task, attention in chat experts and the feed-forward blocks in mathematics and code, can
be named; all others then have their shared part alone.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import exclusive, parts
from moerge.merging.base import Parameters, Spec, choice, scale
from moerge.merging.exclusive import Kept, Signs, Split
from moerge.merging.sources import Block, Delta, Stream, delta_dtype

Array = npt.NDArray[Any]

SPEC = Spec(
    name="one_bit",
    title="1bit-Merging",
    form="whole",
    summary="A shared part, and per expert a sign per value and a scale per tensor, added by the expert's weight.",
    when="A router will pick experts at use, and each may cost one bit per value at most.",
    paper="arXiv 2502.10743",
    parameters=(
        choice(
            "modules",
            ["all", "attention", "mlp"],
            default="all",
            help="Which modules have exclusive parts; the others have the shared part alone.",
        ),
        scale(default=0.3),
    ),
)
_WORDS = {
    "attention": ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "c_attn"),
    "mlp": ("mlp", "ffn", "feed_forward", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc", "intermediate"),
}


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield the shared part, as factors where it stands alone, with the sign codes added by weight."""
    for name in stream.names:
        if _is_coded(name, parameters):
            scales = _scales(stream, name, scale=parameters.scale)
            yield name, stream.map_blocks(name, partial(_coded, scales=scales, scale=parameters.scale))
        else:
            yield name, exclusive.shared(stream, name, scale=parameters.scale)


def split(stream: Stream, parameters: Parameters) -> Split:
    """The parts themselves; a module without a code has one of scale zero."""
    residual = exclusive.residuals(stream, scale=parameters.scale)

    def one(name: str, expert: int) -> Kept:
        size, dtype = residual.size(name), delta_dtype(residual.sources[expert].read(name))
        square = sum(float(np.square(part, dtype=np.float64).sum()) for _, part in residual.blocks(name, expert))
        if not _is_coded(name, parameters):
            empty = np.zeros(-(-size // 8), np.uint8)
            return Kept(Signs(residual.shapes[name], empty, 0.0, dtype), math.sqrt(square))
        mean = _scale(residual, name, expert)
        bits = np.concatenate([values >= 0 for _, values in residual.blocks(name, expert)])
        code = Signs(residual.shapes[name], np.packbits(bits), mean, dtype)
        return Kept(code, math.sqrt(max(0.0, square - size * mean * mean)))

    return Split(stream.names, lambda name: exclusive.shared(stream, name, scale=parameters.scale), one)


def _coded(block: Block, scales: list[float], scale: float) -> Array:
    """shared + sum_t w_t scale_t sign_t, (experts, values) -> (values,)."""
    shared, dtype = _shared(block, scale), block.values.dtype.type
    merged = shared.copy()
    for values, weight, size in zip(block.values, block.weights, scales, strict=True):
        signs = values - shared
        # Adding zero makes a zero below zero one above it.
        signs += dtype(0)
        np.copysign(dtype(size), signs, out=signs)
        signs *= dtype(weight)
        merged += signs
    return merged


def _shared(block: Block, scale: float) -> Array:
    """scale * sum_t D_t, (experts, values) -> (values,)."""
    return np.asarray(parts.total(block.values) * block.values.dtype.type(scale))


def _scales(stream: Stream, name: str, *, scale: float) -> list[float]:
    """The mean magnitude of what the shared part leaves of each expert; fsum makes it the same for any block size."""

    def sums(block: Block) -> Array:
        shared = _shared(block, scale)
        rows = [np.abs(values - shared).reshape(-1, block.width).sum(axis=1) for values in block.values]
        return np.stack(rows).astype(np.float64)

    found = np.concatenate([part for _, part in stream.over_blocks(name, sums)], axis=1)
    return [math.fsum(row) / stream.size(name) for row in found.tolist()]


def _scale(residual: Stream, name: str, expert: int) -> float:
    """The mean magnitude of one tensor; fsum makes it the same for any size of blocks."""
    sizes: list[float] = []
    for _, values in residual.blocks(name, expert):
        sizes += np.abs(values.reshape(-1, residual.width(name))).sum(axis=1, dtype=np.float64).tolist()
    return math.fsum(sizes) / residual.size(name)


def _is_coded(name: str, parameters: Parameters) -> bool:
    """Whether a module is of the kind that carries the task; the innermost name that says so decides."""
    if parameters.modules == "all":
        return True
    for part in reversed(name.lower().split(".")):
        kinds = [kind for kind, words in _WORDS.items() if any(word in part for word in words)]
        if kinds:
            return bool(kinds[0] == parameters.modules)
    return False
