"""PEFT's dare_linear: values of A and of B are dropped at random, then added up apart from each other."""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from moerge.merging import apart, parts
from moerge.merging.base import Parameters, Spec, density
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="peft_dare_linear",
    title="DARE-linear as in PEFT",
    form="whole",
    rank_rule="largest",
    summary="PEFT's dare_linear for comparison: drops values of A and B apart, then adds up.",
    when="Only to compare with what PEFT's dare_linear gives.",
    paper="huggingface/peft, add_weighted_adapter",
    is_random=True,
    parameters=(density(default=0.5),),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Weighted sums of the surviving values of each A and of each B, divided by the density."""

    def work(block: Block) -> npt.NDArray[Any]:
        return parts.weighted_total(apart.drop(block, parameters.density), block.weights)

    yield from apart.merge(stream, work, weigh="root")
