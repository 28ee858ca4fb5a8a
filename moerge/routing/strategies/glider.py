"""The written instruction alone: the global half of GLIDER (arXiv 2410.07172), cosine of query and instruction.

Weak as a ranking of its own. A client that routes by token adds it, times alpha, to what its gates say.
"""

import numpy as np
from numpy.typing import NDArray

from moerge.routing.base import Candidates, Query, Spec

SPEC = Spec(
    name="glider",
    summary="Cosine with the written instruction, or the description: what GLIDER adds to its gates.",
    needs_vector=True,
    min_score=0.20,
    relief=0.028,
    medium=0.42,
    high=0.61,
    paper="arXiv 2410.07172",
)


def score(query: Query, candidates: Candidates) -> NDArray[np.float64]:  # noqa: ARG001  # One interface for all.
    """s_ins: (n,)."""
    return candidates.s_ins
