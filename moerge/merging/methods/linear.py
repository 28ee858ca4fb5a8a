"""Linear: the weighted sum of deltas, or their weighted average."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging.base import MISSING, Parameters, Spec, flag

SPEC = Spec(
    name="linear",
    title="Linear",
    form="element-wise",
    rank_rule="sum",
    summary="Weighted sum of the experts' deltas; exact on the factors, no dense matrix is formed.",
    when="The first thing to try: cheap, exact, and right for two or three experts of related tasks.",
    paper="arXiv 2203.05482 (model soups)",
    divides_by_weights=True,
    parameters=(
        flag("normalize", default=False, help="Divide by the sum of the weights, which makes the sum an average."),
        MISSING,
    ),
)


def coefficients(weights: npt.NDArray[np.float64], parameters: Parameters) -> npt.NDArray[Any]:
    """Factor on each delta, (experts,) -> (experts,)."""
    return np.asarray(weights / weights.sum() if parameters.normalize else weights)
