"""Multi-SLERP: the mean direction of several experts at their mean length."""

from collections.abc import Iterator

from moerge.merging import mixing
from moerge.merging.base import MISSING, Parameters, Spec, flag
from moerge.merging.sources import Delta, Stream

SPEC = Spec(
    name="multislerp",
    title="Multi-SLERP",
    form="whole",
    rank_rule="sum",
    summary="The experts' mean direction, tensor by tensor, at their mean length; exact on the factors.",
    when="Several experts whose sum is too short because they point apart.",
    paper="arcee-ai/mergekit, multislerp",
    divides_by_weights=True,
    parameters=(
        flag("normalize", default=True, help="Divide the weights by their sum; without, the lengths are added up."),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """(sum w u) / |sum w u| * sum w |x| with u = x / |x|, what the published steps in a tangent plane come to.

    A zero delta has no direction, and counts in the mean length.
    """
    for name in stream.names:
        deltas = stream.held(name)
        weights = stream.weights[list(stream.members(name))]
        if parameters.normalize:
            weights = mixing.shares(weights, name=name)
        inner = mixing.products(deltas)
        length = weights @ mixing.lengths(inner)
        yield name, mixing.total(deltas, length * mixing.mean_direction(inner, weights, name=name))
