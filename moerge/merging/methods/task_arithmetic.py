"""Task arithmetic: the scaled weighted sum of deltas; a negative weight forgets a task."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging.base import MISSING, Parameters, Spec, flag, scale

SPEC = Spec(
    name="task_arithmetic",
    title="Task arithmetic",
    form="element-wise",
    rank_rule="sum",
    summary="Scaled sum of the experts' deltas; a negative weight takes a skill away.",
    when="Add skills up, or take one away by a negative weight; tune the scale from .3 to 1.",
    paper="arXiv 2212.04089",
    divides_by_weights=True,
    parameters=(
        scale(),
        flag("normalize", default=False, help="Divide by the sum of the weights before scaling."),
        MISSING,
    ),
)


def coefficients(weights: npt.NDArray[np.float64], parameters: Parameters) -> npt.NDArray[Any]:
    """Factor on each delta, (experts,) -> (experts,)."""
    divisor = weights.sum() if parameters.normalize else 1.0
    return np.asarray(parameters.scale * weights / divisor)
