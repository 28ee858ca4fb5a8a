"""PEFT's magnitude_prune: A and B are trimmed and added up apart from each other."""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from moerge.merging import apart, parts
from moerge.merging.base import Parameters, Spec, density
from moerge.merging.sources import Block, Delta, Stream

SPEC = Spec(
    name="peft_magnitude_prune",
    title="Magnitude prune as in PEFT",
    form="whole",
    rank_rule="largest",
    summary="PEFT's magnitude_prune for comparison: trims A and B apart, then adds up.",
    when="Only to compare with what PEFT's magnitude_prune gives.",
    paper="huggingface/peft, add_weighted_adapter",
    parameters=(density(default=0.5),),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Weighted sums of the largest values of each A and of each B."""

    def work(block: Block) -> npt.NDArray[Any]:
        return parts.weighted_total(apart.keep_largest(block.values, parameters.density), block.weights)

    yield from apart.merge(stream, work, weigh="root")
