"""NuSLERP: spherical interpolation by the experts' weights, of whole tensors or of each row or column alone."""

from collections.abc import Iterator, Sequence

from moerge.merging import mixing
from moerge.merging.base import MISSING, Parameters, Spec, choice
from moerge.merging.sources import Delta, Held, Stream

SPEC = Spec(
    name="nuslerp",
    title="NuSLERP",
    form="whole",
    rank_rule="sum",
    summary="Two experts on the arc between them, as far along as their weights say; exact on the factors.",
    when="Two experts of alike size, with a weight for each; by rows or columns where sizes vary within a tensor.",
    paper="arcee-ai/mergekit, nuslerp",
    divides_by_weights=True,
    most_experts=2,
    parameters=(
        choice(
            "scope",
            ["tensor", "row", "column"],
            default="tensor",
            help="Interpolate a tensor as one vector, or each row (what one output reads) or column of a matrix.",
        ),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """SLERP with t = w_2 / (w_1 + w_2), and no straight line but where two deltas are parallel."""
    for name in stream.names:
        deltas = stream.held(name)
        if len(deltas) == 1:
            yield name, mixing.total(deltas, mixing.ONE)
            continue
        first, second = stream.weights
        yield name, _merged(deltas, share=second / (first + second), scope=parameters.scope)


def _merged(deltas: Sequence[Held | None], *, share: float, scope: str) -> Delta:
    dimensions = next(len(delta.shape) for delta in deltas if delta is not None)
    if scope == "tensor" or dimensions != 2:
        return mixing.total(deltas, mixing.between(mixing.products(deltas), share, parallel=1.0))
    axis = 1 if scope == "row" else 0
    shares = mixing.between(mixing.line_products(deltas, axis=axis), share, parallel=1.0)
    return mixing.total(deltas, shares[:, :, None] if axis == 1 else shares[:, None, :])
