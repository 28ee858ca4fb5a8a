"""PEFT's linear: weighted sums of the A and of the B of all experts, whose product has every cross term."""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from moerge.merging import apart, parts
from moerge.merging.base import Parameters, Spec
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="peft_linear",
    title="Linear as in PEFT",
    form="whole",
    rank_rule="largest",
    summary="PEFT's linear for comparison: A and B are added up apart, which is not a sum of deltas.",
    when="Only to compare with what PEFT's linear gives.",
    paper="huggingface/peft, add_weighted_adapter",
)


def merge(stream: Stream, _parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """A = sum sign(w c) sqrt|w c| A_t, B = sum sqrt|w c| B_t for weights w and scalings c."""
    yield from apart.merge(stream, _work, weigh="root")


def _work(block: Block) -> npt.NDArray[Any]:
    return parts.weighted_total(block.values, block.weights)
