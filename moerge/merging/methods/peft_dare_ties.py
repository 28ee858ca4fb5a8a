"""PEFT's dare_ties: values of A and of B are dropped at random, then elected and merged apart from each other."""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from moerge.merging import apart
from moerge.merging.base import Parameters, Spec, density
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="peft_dare_ties",
    title="DARE-TIES as in PEFT",
    form="whole",
    rank_rule="largest",
    summary="PEFT's dare_ties for comparison: drops values of A and B apart, then elects signs.",
    when="Only to compare with what PEFT's dare_ties gives.",
    paper="huggingface/peft, add_weighted_adapter",
    is_random=True,
    parameters=(
        density(default=0.5),
        apart.ELECT,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """The mean of the surviving values of each factor that have the elected sign; weights do not vote."""

    def work(block: Block) -> npt.NDArray[Any]:
        return apart.elected_mean(apart.drop(block, parameters.density), block.weights, by=parameters.elect)

    yield from apart.merge(stream, work, weigh="root")
