"""SVD: the weighted sum of deltas at a smaller rank, the closest there is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors
from moerge.merging.base import Parameters, Spec
from moerge.merging.sources import Factors

SPEC = Spec(
    name="svd",
    title="SVD",
    form="factor",
    rank_rule="largest",
    summary="The best approximation of the weighted sum at the largest rank of the experts, or at a chosen one.",
    when="The exact weighted sum at a rank that serving allows.",
    paper="huggingface/peft, add_weighted_adapter",
)


def merge(items: Sequence[Factors], weights: npt.NDArray[np.float64], _parameters: Parameters) -> Factors:
    """The exact sum; the frame truncates it to the output rank by an SVD of the core."""
    return factors.stack(items, weights)


def coefficients(weights: npt.NDArray[np.float64], _parameters: Parameters) -> npt.NDArray[Any]:
    """The same sum for tensors that have no factors."""
    return weights
