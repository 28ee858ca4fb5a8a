"""LoraHub: experts composed with the coefficients that a search on a few examples of a new task has found."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import apart, mixing, parts
from moerge.merging.base import MISSING, Parameters, Spec, choice
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="lorahub",
    title="LoraHub",
    form="whole",
    group=3,
    rank_rule="sum",
    summary="Experts composed with coefficients found by search; give those as weights, from -1.5 to 1.5 in the paper.",
    when="Weights were found by a search on a few examples of a new task.",
    paper="arXiv 2307.13269",
    parameters=(
        choice(
            "composition",
            ["delta", "release"],
            default="delta",
            help="Add up deltas; or A and B apart, as the authors' code does, so that weights are squared.",
        ),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """sum w c B A; or (sum w B)(sum w c A), in which w and -w are the same."""
    if parameters.composition == "release":
        yield from apart.merge(stream, _work, weigh="whole")
        return
    for name in stream.names:
        yield name, mixing.total(stream.deltas(name), stream.weights[list(stream.members(name))])


def penalty(weights: npt.NDArray[Any]) -> float:
    """What the search adds to the loss of a composition, 0.05 * mean |w| (arXiv 2307.13269, equation 2)."""
    return float(0.05 * np.abs(weights).mean())


def _work(block: Block) -> npt.NDArray[Any]:
    return parts.weighted_total(block.values, block.weights)
