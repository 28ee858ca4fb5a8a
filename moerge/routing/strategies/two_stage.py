"""Category first, then expert, as in MoDEM (arXiv 2410.07490) and Composition of Experts (arXiv 2412.01868).

A category is a tag, placed in the middle of its experts. The eight nearest to the query are looked into, where experts
are ordered by the hybrid score; an expert outside of them counts half. Without tags an expert is a category of its own.
"""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, hybrid_score

SPEC = Spec(
    name="two_stage",
    summary="The nearest tags first, then the hybrid score among their experts.",
    needs_vector=True,
    min_score=0.22,
    relief=0.018,
    medium=0.41,
    high=0.54,
    needs_tags=True,
    paper="arXiv 2410.07490",
)

_CATEGORIES = 8


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """The hybrid score, half of it outside of the eight nearest categories: (n,)."""
    scores = hybrid_score(candidates)
    nearer = len(candidates.tag_cosines) - np.searchsorted(
        np.sort(candidates.tag_cosines), _own_category(candidates), side="right"
    )
    return np.where(nearer < _CATEGORIES, scores, np.minimum(scores, scores / 2))


def _own_category(candidates: Candidates) -> NDArray[np.float64]:
    """Cosine of the query with the nearest tag of each candidate, with its own centroid where it has no tag: (n,)."""
    places, tags = candidates.tagged.T
    nearest = np.full(len(candidates.experts), -np.inf)
    np.maximum.at(nearest, places, candidates.tag_cosines[tags])
    return np.where(np.isneginf(nearest), candidates.s_cen, nearest)
