"""Consensus TA: task arithmetic on the values that enough experts care about."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.base import MISSING, Parameters, Spec, integer, number, scale
from moerge.merging.sources import Block

SPEC = Spec(
    name="consensus_ta",
    title="Consensus TA",
    form="element-wise",
    summary="Task arithmetic without the values that matter to fewer than k experts (TALL masks).",
    when="Four or more experts, where values that serve one alone do more harm than good.",
    paper="arXiv 2405.07813",
    parameters=(
        number(
            "threshold",
            default=0.4,
            minimum=0.0,
            help="An expert cares for a value larger than this share of the rest.",
        ),
        integer("min_experts", default=2, minimum=0, maximum=100, help="How many experts must care; 0 keeps all."),
        scale(default=0.3),
        MISSING,
    ),
)


def merge(block: Block, _state: None, parameters: Parameters) -> npt.NDArray[Any]:
    """scale * S * [number of t with |x_t| > threshold * |S - x_t| >= min_experts], S = sum w_t x_t."""
    values = parts.weigh(block.values, block.weights)
    summed = parts.total(values)
    threshold = values.dtype.type(parameters.threshold)
    votes = parts.total((np.abs(values) > threshold * np.abs(summed - values)).astype(np.int32))
    return np.asarray(values.dtype.type(parameters.scale) * summed * (votes >= parameters.min_experts))
