"""Cat: the factors of all experts side by side, which is the weighted sum of deltas without any rounding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors
from moerge.merging.base import Parameters, Spec
from moerge.merging.sources import Factors

SPEC = Spec(
    name="cat",
    title="Concatenation",
    form="factor",
    rank_rule="all",
    summary="The experts' factors side by side: the exact weighted sum, at the sum of the ranks.",
    when="The exact weighted sum is wanted and a rank of all ranks together is affordable.",
    paper="huggingface/peft, add_weighted_adapter",
)


def merge(items: Sequence[Factors], weights: npt.NDArray[np.float64], _parameters: Parameters) -> Factors:
    """B = [B_1 .. B_T], A = [w_1 A_1; .. w_T A_T] with every scaling folded in."""
    return factors.stack(items, weights)


def coefficients(weights: npt.NDArray[np.float64], _parameters: Parameters) -> npt.NDArray[Any]:
    """The same sum for tensors that have no factors."""
    return weights
