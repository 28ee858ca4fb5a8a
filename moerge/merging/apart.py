"""Factors merged apart from each other: all A to one A and all B to one B, as PEFT's and LoraHub's releases do.

The product of such an A and B holds every B_i A_j of two experts, and changes with the split of a delta into factors.
Methods that do so are here for compatibility.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging import noise, parts
from moerge.merging.base import choice
from moerge.merging.sources import Block, Delta, Factors, LowRank, Stream

Array = npt.NDArray[Any]
Work = Callable[[Block], Array]
ELECT = choice(
    "elect",
    ["total", "frequency"],
    default="total",
    help="The sign of the sum of values, or of the sum of their signs.",
)


def merge(stream: Stream, work: Work, *, weigh: Literal["root", "whole"]) -> Iterator[tuple[str, Delta]]:
    """Every tensor by `work`, which makes (values,) of a block of (experts, values) that is one whole factor.

    `root` gives each factor the root of weight times scaling, and A the sign too, as PEFT does; `whole` gives both
    factors the weight and A the scaling, as LoraHub does. Experts without a module do not take part in it; a tensor
    that has no factors is merged as it is. Raises ExpertsIncompatible when ranks differ.
    """
    for name in stream.names:
        owners = stream.owners(name)
        given = [stream.sources[i].tensors[name] for i in owners]
        factored = [item for item in given if isinstance(item, LowRank)]
        weights = stream.weights[list(owners)]
        if len(factored) < len(given):
            found = [stream.sources[i].read(name) for i in owners]
            dense = np.stack([item.delta() if isinstance(item, Factors) else item for item in found])
            yield name, work(_block(stream, name, name, dense, weights)).reshape(dense.shape[1:])
            continue
        _check_ranks(stream, name, [len(item.A) for item in factored])
        A, B = np.stack([item.A for item in factored]), np.stack([item.B for item in factored])
        scalings = np.array([item.scaling for item in factored], dtype=np.float64)
        if weigh == "root":
            size = np.sqrt(np.abs(weights * scalings))
            signs = np.where(weights * scalings < 0, -1.0, 1.0)
            of_A, of_B = size * signs, size
        else:
            of_A, of_B = weights * scalings, weights
        merged_B = work(_block(stream, name, f"{name}.B", B, of_B)).reshape(B.shape[1:])
        yield name, Factors(merged_B, work(_block(stream, name, f"{name}.A", A, of_A)).reshape(A.shape[1:]))


def keep_largest(values: Array, density: float) -> Array:
    """Each expert's largest values, floor(density * n) of them, as PEFT counts; (experts, values), the rest zero."""
    count = parts.count_kept(density, values.shape[1], minimum=0)
    return np.stack([row * parts.keep_largest(row, count) for row in values])


def elected_mean(values: Array, weights: Array, *, by: Literal["total", "frequency"]) -> Array:
    """Sum of the weighted values whose unweighted sign is the elected one, by their number; -> (values,)."""
    agreeing = parts.agree(values, parts.elect_signs(values, by=by))
    count = parts.total(agreeing.astype(values.dtype))
    return parts.divide(parts.total(parts.weigh(values, weights) * agreeing), count)


def drop(block: Block, density: float) -> Array:
    """Values that survive with probability `density`, divided by it; (experts, values)."""
    kept = np.stack([noise.keep(block.noise(row), density) for row in range(len(block.values))])
    return np.asarray(block.values * kept / block.values.dtype.type(density))


def _block(stream: Stream, name: str, part: str, values: Array, weights: Array) -> Block:
    """One factor of all experts that have it, (experts, rows, columns), as a block whose noise goes by its own name."""
    owners = stream.owners(name)
    digests = tuple(stream.sources[i].digest for i in owners)
    flat = values.reshape(len(values), -1)
    width = values.shape[-1] if values.ndim > 1 else 1
    return Block(part, flat, 0, width, flat.shape[1], owners, weights, digests, stream.seed)


def _check_ranks(stream: Stream, name: str, ranks: list[int]) -> None:
    for owner, rank in zip(stream.owners(name), ranks, strict=True):
        if rank != ranks[0]:
            first = stream.sources[stream.owners(name)[0]]
            raise ExpertsIncompatible(
                f"{name} has rank {rank} in {stream.sources[owner]} and {ranks[0]} in {first}; methods that merge A and"
                " B apart need equal ranks.",
                pointer="/experts",
                met=rank,
                wanted=ranks[0],
                remedy="Use linear or ties, which merge deltas and take any ranks.",
            )
