"""How many ranks a merged delta gets: a number of them, or as many as a share of its energy takes.

Energy is the squared Frobenius norm. What a cut keeps is exact, since it is that of the factors that are written; the
singular values of a large dense delta beyond those are estimates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moerge.merging import factors, noise
from moerge.merging.factors import Float64, Truncated
from moerge.merging.sources import Delta, Factors

# Shares are compared with this slack: sums of squares of equal deltas differ in their last digits.
_SLACK = 1e-9
_FIRST_RANK = 64


def fit(delta: Delta, *, rank: int, energy: float | None, name: str) -> Truncated:
    """A merged delta at a rank, or at the smallest rank of at most `rank` that keeps the share `energy`.

    Where the share is not reached the delta has `rank`, and `share` says what it keeps. `name` seeds the randomised
    SVD.
    """
    if energy is None:
        return factors.fit(delta, rank, name=name)
    if isinstance(delta, Factors):
        found = factors.truncate(delta, delta.rank)
        return _cut(found, _smallest(found, energy) or rank)
    tried = min(_FIRST_RANK, rank)
    while True:
        found = factors.truncate_dense(delta, tried, key=noise.key(0, "svd", name))
        wanted = _smallest(found, energy)
        if wanted is not None or tried >= rank:
            return _cut(found, wanted or tried)
        tried = min(2 * tried, rank)


def _smallest(found: Truncated, energy: float) -> int | None:
    """The smallest rank among those found that keeps a share of the whole; 1 for a delta of zero."""
    if found.whole == 0:
        return 1
    reached = np.flatnonzero(np.cumsum(found.sizes[: found.factors.rank]) >= (energy - _SLACK) * found.whole)
    return int(reached[0]) + 1 if reached.size else None


def _cut(found: Truncated, rank: int) -> Truncated:
    cut = Factors(np.ascontiguousarray(found.factors.B[:, :rank]), np.ascontiguousarray(found.factors.A[:rank]))
    return Truncated(cut, float(found.sizes[:rank].sum()), found.whole, found.sizes)


@dataclass(frozen=True)
class Spectrum:
    """What is known of one module's energy: all of it, what was kept at a rank, and squared singular values."""

    whole: float
    kept: float
    rank: int
    sizes: Float64

    @classmethod
    def of(cls, found: Truncated) -> "Spectrum":
        """The energy of a delta that was fitted."""
        return cls(found.whole, found.kept, found.factors.rank, found.sizes)

    @property
    def share(self) -> float:
        """Kept over whole, 1 for a delta of zero."""
        return min(1.0, self.kept / self.whole) if self.whole > 0 else 1.0

    @property
    def is_known(self) -> bool:
        """Whether the singular values make up all energy, so that what any rank keeps is no estimate."""
        return not self.sizes.size or bool(self.sizes.sum() >= (1 - 1e-6) * self.whole)

    def at_most(self, rank: int) -> float:
        """Energy that a rank of at least the present one keeps: exact where `is_known`, else an upper bound.

        No singular value beyond those found is larger than the last that was found accurately.
        """
        if not self.sizes.size:
            return self.kept
        if self.is_known:
            return float(self.sizes[:rank].sum())
        return min(self.whole, self.kept + (rank - self.rank) * float(self.sizes[self.rank - 1]))


def rank_for(spectra: Sequence[Spectrum], share: float) -> tuple[int, bool]:
    """The smallest rank that keeps a share of the energy of all modules together, and whether it is exact.

    Where it is not, more than that rank may be needed. `spectra` are those of a merge that keeps less.
    """
    wanted = (share - _SLACK) * sum(item.whole for item in spectra)
    low = min(item.rank for item in spectra)
    high = low + 1
    while sum(item.at_most(high) for item in spectra) < wanted and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(item.at_most(middle) for item in spectra) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high, all(item.is_known for item in spectra)
