"""Tags recruited from the query, as skills are in Symbolic-MoE (arXiv 2503.05641).

The ten tags nearest to the query are what it needs, each by its cosine. An expert's share of them lifts it above others
of equal fit: of two that match as well, the one that is at home in more of what is asked comes first.
"""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec, hybrid_score

SPEC = Spec(
    name="skills",
    summary="The hybrid score, and for each expert the share that it has of the tags the query needs.",
    needs_vector=True,
    min_score=0.22,
    # Among few experts there are few tags, so each has a larger share of them, which makes up for the rest.
    relief=0.0,
    medium=0.32,
    high=0.51,
    needs_tags=True,
    paper="arXiv 2503.05641",
)

_RECRUITED = 10


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """0.8 of the hybrid score and 0.2 of the share of the recruited tags: (n,)."""
    needed = np.zeros(len(candidates.tag_cosines))
    recruited = np.argsort(-candidates.tag_cosines, kind="stable")[:_RECRUITED]
    needed[recruited] = np.maximum(candidates.tag_cosines[recruited], 0)
    share = np.zeros(len(candidates.experts))
    places, tags = candidates.tagged.T
    np.add.at(share, places, needed[tags])
    return 0.8 * hybrid_score(candidates) + 0.2 * share / (needed.sum() or 1.0)
