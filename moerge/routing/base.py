"""What every route strategy is made of: its SPEC, the query it is asked and the candidates it scores."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# How many cards the thresholds were measured on.
_CALIBRATED_COUNT = 669


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A strategy in the catalogue.

    Scores of two strategies are on different scales, so each brings its thresholds: below `min_score` the answer is
    empty unless the caller sets another; from `medium` and from `high` on a hit is called so. They are those among 669
    experts or more, and `relief` is what they fall by for each unit of idf less.
    """

    name: str
    summary: str
    needs_vector: bool
    min_score: float
    relief: float
    medium: float
    high: float
    needs_tags: bool = False
    paper: str = ""

    def threshold(self, expert_count: int) -> float:
        """The score below which a query among so many experts is taken to have none."""
        return round(max(0.0, self.min_score - self._relief(expert_count)), 3)

    def confidence(self, score: float, expert_count: int) -> str:
        """`high`, `medium` or `low` for a score of this strategy among so many experts."""
        relieved = score + self._relief(expert_count)
        if relieved >= self.high:
            return "high"
        return "medium" if relieved >= self.medium else "low"

    def _relief(self, expert_count: int) -> float:
        """By how much all thresholds fall among so many experts.

        Among few experts words weigh less (idf) and the best of few strangers comes less near. Measured on random
        subsets of 3 to 669 cards, the score under which the same share of right queries lies grows in proportion
        to the highest idf: from .14 among 3 cards to .24 among 669 for `hybrid`.
        """
        return self.relief * max(0.0, _highest_idf(_CALIBRATED_COUNT) - _highest_idf(expert_count))


def _highest_idf(expert_count: int) -> float:
    """BM25's weight of a word that one card alone has."""
    return math.log1p((max(1, expert_count) - 0.5) / 1.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """A question as text and, where an encoder is at hand, as unit vector (d,)."""

    text: str
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The experts considered, as columns of equal length n.

    s_ex: best cosine with an example (the description's where there is none); s_desc: cosine with the description;
    s_cen: cosine with the examples' centroid (the description's where there is none); s_ins: cosine with the written
    instruction (the description's where there is none); all 0 without query vector.
    matched: position of the best example on the card, -1 where there is none or no query vector.
    Of tags only a strategy with `needs_tags` is told, else both arrays are empty. tag_cosines: (T,) of every tag on the
    base model, cosine with its centroid, which is the unit mean of the centroids of all experts that carry it.
    tagged: (m, 2) integers, one row for each tag that a candidate carries: the candidate's place and the tag's,
    in ascending order.
    """

    experts: tuple[str, ...]
    s_ex: NDArray[np.float64]
    s_desc: NDArray[np.float64]
    s_cen: NDArray[np.float64]
    s_ins: NDArray[np.float64]
    bm25: NDArray[np.float64]
    matched: NDArray[np.int64]
    tag_cosines: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    tagged: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    has_vector: bool = True


# BM25 has no upper end. b / (b + 60) puts it on the scale of a cosine without looking at the other candidates,
# so that one threshold holds for all queries; 60 was chosen on the development queries.
BM25_HALF = 60.0


def saturated(bm25: NDArray[np.float64]) -> NDArray[np.float64]:
    """BM25 scores on a scale of 0 to 1: (n,) -> (n,)."""
    return bm25 / (bm25 + BM25_HALF)


def dense_score(candidates: Candidates) -> NDArray[np.float64]:
    """D = 0.6 s_ex + 0.2 s_desc + 0.2 s_cen: (n,)."""
    return 0.6 * candidates.s_ex + 0.2 * candidates.s_desc + 0.2 * candidates.s_cen


def hybrid_score(candidates: Candidates) -> NDArray[np.float64]:
    """0.5 D + 0.5 b / (b + 60): (n,)."""
    return 0.5 * dense_score(candidates) + 0.5 * saturated(candidates.bm25)
