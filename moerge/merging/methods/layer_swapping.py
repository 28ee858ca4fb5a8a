"""Layer swapping: whole layers from one expert or another, by a map, with averaged layers in between."""

from collections.abc import Iterator

import numpy as np

from moerge.merging import layers, mixing
from moerge.merging.base import Parameters, Spec, layer_map
from moerge.merging.sources import Delta, Stream

SPEC = Spec(
    name="layer_swapping",
    title="Layer swapping",
    form="whole",
    rank_rule="sum",
    summary="Each layer from the expert that a map names, such as outer layers of a language expert in one for a task.",
    when="A language expert and a task expert, each of which is needed in other layers.",
    paper="arXiv 2410.01335",
    is_ordered=True,
    divides_by_weights=True,
    parameters=(
        layer_map(
            "layers",
            default="other=average",
            help="Whose each layer is: an expert by its position from 0, several with factors, or their average by"
            " weight; other is for the rest, such as embeddings and heads.",
        ),
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """The named experts' deltas times their factors in the map; weights count in averages alone."""
    found = layers.parse(parameters.layers)
    assert found is not None, "parameters are checked before"
    average = mixing.shares(stream.weights, name="a layer")
    for name in stream.names:
        shares = found.of(name)
        taken = average if shares is None else np.array([shares.get(i, 0.0) for i in range(len(average))])
        deltas = [delta if value else None for delta, value in zip(stream.held(name), taken, strict=True)]
        if all(delta is None for delta in deltas):
            # Nobody who is named has this tensor.
            deltas = stream.held(name)
        yield name, mixing.total(deltas, taken)
