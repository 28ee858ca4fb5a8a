"""PEFT's ties: TIES on A and on B apart from each other, unrelated to TIES on the delta."""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from moerge.merging import apart
from moerge.merging.base import Parameters, Spec, density
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="peft_ties",
    title="TIES as in PEFT",
    form="whole",
    rank_rule="largest",
    summary="PEFT's ties for comparison: A and B are trimmed, elected and merged apart.",
    when="Only to compare with what PEFT's ties gives.",
    paper="huggingface/peft, add_weighted_adapter",
    parameters=(
        density(default=0.5),
        apart.ELECT,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """The mean of the values of each factor that have the elected sign; weights do not vote."""

    def work(block: Block) -> npt.NDArray[Any]:
        trimmed = apart.keep_largest(block.values, parameters.density)
        return apart.elected_mean(trimmed, block.weights, by=parameters.elect)

    yield from apart.merge(stream, work, weigh="root")
