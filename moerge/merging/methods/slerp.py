"""SLERP: from one expert to another along an arc instead of a straight line."""

from collections.abc import Iterator

from moerge.merging import mixing
from moerge.merging.base import MISSING, Parameters, Spec, number
from moerge.merging.sources import Delta, Stream

SPEC = Spec(
    name="slerp",
    title="SLERP",
    form="whole",
    rank_rule="sum",
    summary="Two experts, tensor by tensor, on the arc between them; exact on the factors.",
    when="Exactly two experts; `t` says how far from the first to the second.",
    paper="Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985); arcee-ai/mergekit, slerp",
    is_ordered=True,
    divides_by_weights=True,
    most_experts=2,
    parameters=(
        number(
            "t",
            default=None,
            minimum=0.0,
            maximum=1.0,
            help="Where between the first expert (0) and the second (1), whatever their weights. Null: the second's"
            " share of the weights.",
        ),
        number(
            "threshold",
            default=0.9995,
            minimum=0.0,
            maximum=1.0,
            help="Deltas whose cosine is beyond this, on either side of zero, are interpolated on a straight line.",
        ),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """sin((1 - t) angle) / sin(angle) a + sin(t angle) / sin(angle) b on the deltas at their own lengths."""
    for name in stream.names:
        deltas = stream.held(name)
        if len(deltas) == 1:
            yield name, mixing.total(deltas, mixing.ONE)
            continue
        first, second = stream.weights
        share = second / (first + second) if parameters.t is None else parameters.t
        yield name, mixing.total(deltas, mixing.between(mixing.products(deltas), share, parallel=parameters.threshold))
