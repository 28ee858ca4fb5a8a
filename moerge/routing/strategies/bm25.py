"""Words alone: b / (b + 20). Needs no encoder, so it answers while the encoder loads."""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, saturated

SPEC = Spec(
    name="bm25",
    summary="Shared words alone (BM25); needs no encoder.",
    needs_vector=False,
    # Low on purpose: while the encoder loads, an answer that says it is a guess helps more than none.
    min_score=0.25,
    relief=0.044,
    medium=0.45,
    high=0.80,
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """BM25 on a scale of 0 to 1: (n,)."""
    return saturated(candidates.bm25)
