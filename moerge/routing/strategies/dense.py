"""Vectors alone: D. For queries that share no words with the cards, and for vectors made by the caller."""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, dense_score

SPEC = Spec(
    name="dense",
    summary="Meaning alone: cosine with examples, description and centroid.",
    needs_vector=True,
    min_score=0.28,
    relief=0.029,
    medium=0.41,
    high=0.69,
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """D = 0.6 s_ex + 0.2 s_desc + 0.2 s_cen: (n,)."""
    return dense_score(candidates)
