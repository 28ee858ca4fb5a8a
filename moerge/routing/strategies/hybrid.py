"""Vectors and words together: 0.5 D + 0.5 b / (b + 60), the best of all mixtures measured without training."""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, hybrid_score

SPEC = Spec(
    name="hybrid",
    summary="Meaning (examples, description, centroid) and shared words in one score.",
    needs_vector=True,
    min_score=0.24,
    relief=0.021,
    medium=0.39,
    high=0.54,
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """0.5 D + 0.5 b / (b + 60): (n,)."""
    return hybrid_score(candidates)
