"""Words alone: b / (b + 60). Needs no encoder, so it answers while the encoder loads."""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, saturated

SPEC = Spec(
    name="bm25",
    summary="Shared words alone (BM25); needs no encoder.",
    needs_vector=False,
    # Low on purpose: while the encoder loads, an answer that says it is a guess helps more than none.
    min_score=0.20,
    relief=0.038,
    medium=0.39,
    high=0.71,
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """BM25 on a scale of 0 to 1: (n,)."""
    return saturated(candidates.bm25)
