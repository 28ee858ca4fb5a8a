"""LM-Cocktail: the average of experts in which those count more that lose less on a few examples."""

from collections.abc import Iterator

import numpy as np

from moerge.merging import coefficients, mixing
from moerge.merging.base import MISSING, Parameters, Spec, number
from moerge.merging.sources import Delta, Stream

SPEC = Spec(
    name="lm_cocktail",
    title="LM-Cocktail",
    form="whole",
    group=3,
    needs=("loss",),
    rank_rule="sum",
    summary="Average by the softmax of minus each expert's loss on a few examples of the task; exact on the factors.",
    when="A few labelled examples of the target task are at hand, and the loss of each expert on them is known.",
    paper="arXiv 2311.13534",
    divides_by_weights=True,
    parameters=(
        number(
            "temperature",
            default=5.0,
            minimum=0.0,
            above=True,
            help="Losses are divided by this; the larger it is, the more alike experts count.",
        ),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """sum v D / sum v with v = w exp(-loss / temperature); equal weights w give the published softmax."""
    losses = np.array([coefficients.of(source, "loss") for source in stream.sources])
    votes = stream.weights * np.exp((losses.min() - losses) / parameters.temperature)
    for name in stream.names:
        yield name, mixing.total(stream.deltas(name), mixing.shares(votes[list(stream.members(name))], name=name))
