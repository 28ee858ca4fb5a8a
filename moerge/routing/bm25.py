"""BM25 over one document per expert (Robertson and Zaragoza, doi:10.1561/1500000019), with Lucene's idf.

    b(q, e) = sum over distinct t in q of  idf(t) * f(t, e) * (k1 + 1) / (f(t, e) + k1 * (1 - b + b * |e| / mean|e|))
    idf(t)  = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

The idf is never negative, so a word on every card adds little but never counts against a card.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moerge.routing import cards

K1 = 1.2
B = 0.75


@dataclass(frozen=True, eq=False)
class Postings:
    """Where one term occurs: slots, ascending, and how often in each."""

    slots: NDArray[np.int64]
    frequencies: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bm25:
    """An immutable index: a change makes a new one that shares the postings of every untouched term."""

    terms: Mapping[str, Postings]
    lengths: NDArray[np.float64]  # (slots,) words per document, 0 where the slot is empty
    document_count: int

    def scores(self, text: str) -> NDArray[np.float64]:
        """Score of every slot for a query: text -> (slots,), 0 where no word is shared; a repeated word counts once."""
        scores = np.zeros(len(self.lengths))
        if not self.document_count:
            return scores
        mean = self.lengths.sum() / self.document_count
        # Documents without a single word would make the mean 0; nothing matches them anyway.
        norms = K1 * (1 - B + B * self.lengths / (mean or 1.0))
        for term in dict.fromkeys(cards.tokens(text)):
            postings = self.terms.get(term)
            if postings is not None:
                found = postings.frequencies
                gain = found * (K1 + 1) / (found + norms[postings.slots])
                scores[postings.slots] += self.idf(len(postings.slots)) * gain
        return scores

    def idf(self, containing_count: int) -> float:
        """Weight of a term that `containing_count` documents contain."""
        return math.log1p((self.document_count - containing_count + 0.5) / (containing_count + 0.5))

    def changed(
        self,
        *,
        slot_count: int,
        removed: Mapping[int, Mapping[str, int]],
        added: Mapping[int, Mapping[str, int]],
    ) -> "Bm25":
        """The index after taking out and putting in documents; each is given as slot -> word counts.

        A document that is replaced in its slot stands in both. `slot_count` is the number of slots afterwards.
        """
        lengths = np.zeros(slot_count)
        kept = min(slot_count, len(self.lengths))
        lengths[:kept] = self.lengths[:kept]
        for slot in removed:
            if slot < slot_count:
                lengths[slot] = 0.0
        for slot, counts in added.items():
            lengths[slot] = sum(counts.values())
        incoming: dict[str, list[tuple[int, int]]] = {}
        for slot, counts in sorted(added.items()):
            for term, count in counts.items():
                incoming.setdefault(term, []).append((slot, count))
        touched = {term for counts in removed.values() for term in counts} | incoming.keys()
        gone = np.fromiter(removed, dtype=np.int64)
        terms = dict(self.terms)
        for term in touched:
            postings = _merged(terms.pop(term, None), gone, incoming.get(term, []))
            if len(postings.slots):
                terms[term] = postings
        return Bm25(terms=terms, lengths=lengths, document_count=self.document_count - len(removed) + len(added))


EMPTY = Bm25(terms={}, lengths=np.zeros(0), document_count=0)


def _merged(old: Postings | None, gone: NDArray[np.int64], incoming: list[tuple[int, int]]) -> Postings:
    slots = np.array([slot for slot, _ in incoming], dtype=np.int64)
    frequencies = np.array([count for _, count in incoming], dtype=np.float64)
    if old is not None:
        kept = ~np.isin(old.slots, gone)
        slots = np.concatenate([old.slots[kept], slots])
        frequencies = np.concatenate([old.frequencies[kept], frequencies])
        order = np.argsort(slots, kind="stable")
        slots, frequencies = slots[order], frequencies[order]
    return Postings(slots=slots, frequencies=frequencies)
