"""Magnitude prune: keep each expert's largest values, then add up."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts, selection
from moerge.merging.base import MISSING, Parameters, Spec, choice, density, flag, integer, scale
from moerge.merging.sources import Block, Stream

SPEC = Spec(
    name="magnitude_prune",
    title="Magnitude prune",
    form="element-wise",
    summary="Sum of the experts' deltas after each kept only its largest values.",
    when="Noise in the small values is the trouble, and signs do not conflict.",
    paper="arXiv 2306.01708, step 1",
    divides_by_weights=True,
    parameters=(
        density(),
        choice("scope", ["tensor", "global"], default="tensor", help="Rank values per tensor or over a whole expert."),
        integer("min_keep", default=1, minimum=0, maximum=1, help="Keep at least this many values of a tensor."),
        scale(),
        flag("normalize", default=False, help="Divide by the sum of the weights."),
        MISSING,
    ),
)


def prepare(stream: Stream, parameters: Parameters) -> selection.Cuts:
    """The magnitude each expert's tensors are cut at."""
    return selection.cuts(stream, density=parameters.density, scope=parameters.scope, minimum=parameters.min_keep)


def merge(block: Block, state: selection.Cuts, parameters: Parameters) -> npt.NDArray[Any]:
    """scale * sum w_t trimmed_t, (experts, values) -> (values,)."""
    divisor = block.weights.sum() if parameters.normalize else np.float64(1)
    return parts.weighted_total(selection.trim(block, state), parameters.scale * block.weights / divisor)
