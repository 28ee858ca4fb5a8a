"""The middle of the examples alone, as in ARIADNE (arXiv 2606.19079) and LoraRetriever (arXiv 2402.09997).

One vector for each expert: what an index of very many experts, or a client of its own, can afford.
"""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec

SPEC = Spec(
    name="centroid",
    summary="Cosine with the middle of the example inputs alone: one vector for each expert.",
    needs_vector=True,
    min_score=0.30,
    relief=0.032,
    medium=0.45,
    high=0.86,
    paper="arXiv 2402.09997",
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """s_cen: (n,)."""
    return candidates.s_cen
