"""Vectors and words together: 0.6 D + 0.4 b / (b + 20), the best of all mixtures measured without training."""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, dense_score, saturated

SPEC = Spec(
    name="hybrid",
    summary="Meaning (examples, description, centroid) and shared words in one score.",
    needs_vector=True,
    min_score=0.30,
    relief=0.033,
    medium=0.40,
    high=0.60,
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """0.6 D + 0.4 b / (b + 20): (n,)."""
    return 0.6 * dense_score(candidates) + 0.4 * saturated(candidates.bm25)
