"""BM25 over one document per expert (Robertson and Zaragoza, doi:10.1561/1500000019), with Lucene's idf.

    b(q, e) = sum over distinct t in q of  idf(t) * f(t, e) * (k1 + 1) / (f(t, e) + k1 * (1 - b + b * |e| / mean|e|))
    idf(t)  = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

The idf is never negative, so a word on every card adds little but never counts against a card. N, n(t) and mean|e|
are counted over all documents in use, wherever they are stored, so where they are stored changes no score.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moerge.routing import cards
from moerge.routing.ragged import Strings, ranges

K1 = 1.2
B = 0.75

# How many postings are counted at once: what that takes stays in the processor's cache, and a long query in memory.
_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """The terms of numbered documents: postings of term t stand from `starts[t]` to `starts[t + 1]`.

    Terms are in the order of their keys, which are hashes, and of their letters where two have the same key.
    """

    keys: NDArray[np.uint64]  # (terms,)
    terms: Strings
    starts: NDArray[np.int64]  # (terms + 1,)
    slots: NDArray[np.int32]  # (postings,) documents that have the term, ascending within each
    frequencies: NDArray[np.int32]  # (postings,) how often they have it
    lengths: NDArray[np.int64]  # (documents,) terms in each, repeated ones counted each time

    def postings(self, terms: Sequence[str]) -> list[slice]:
        """Where the postings of each term stand; an empty slice for an unknown one."""
        asked = _keys(terms)
        firsts = np.searchsorted(self.keys, asked, side="left").tolist()
        lasts = np.searchsorted(self.keys, asked, side="right").tolist()
        found = []
        for term, first, last in zip(terms, firsts, lasts, strict=True):
            place = next((place for place in range(first, last) if self.terms[place] == term), -1)
            found.append(slice(int(self.starts[place]), int(self.starts[place + 1])) if place >= 0 else slice(0, 0))
        return found


def _keys(terms: Sequence[str]) -> NDArray[np.uint64]:
    """A hash of each term, the same on every machine: (terms,)."""
    digests = (hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest() for term in terms)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


class Collector:
    """Takes in documents one by one and makes Words of them."""

    def __init__(self) -> None:
        self._terms: dict[str, int] = {}
        self._term_of = array("i")
        self._frequencies = array("i")
        self._distinct = array("i")
        self._lengths = array("q")

    def add(self, counts: Mapping[str, int]) -> None:
        """Take in the next document, given as word -> count."""
        terms = self._terms
        self._term_of.extend([terms.setdefault(term, len(terms)) for term in counts])
        self._frequencies.extend(counts.values())
        self._distinct.append(len(counts))
        self._lengths.append(sum(counts.values()))

    def words(self, order: NDArray[np.int64]) -> Words:
        """All documents, the one taken in at `order[i]` as number i: (documents,) -> Words."""
        names = sorted(self._terms)
        keys = _keys(names)
        by_key = np.argsort(keys, kind="stable")
        rank = np.empty(len(names), dtype=np.int32)
        rank[np.array([self._terms[name] for name in names], dtype=np.int64)[by_key]] = np.arange(len(names))
        # Postings in the order of the documents, then, which a stable sort keeps within each, by term.
        counts = np.array(self._distinct, dtype=np.int64)
        ends = np.cumsum(counts)
        taken = ranges((ends - counts)[order], ends[order])
        terms = rank[np.array(self._term_of, dtype=np.int32)[taken]]
        by_term = np.argsort(terms, kind="stable")
        return Words(
            keys=keys[by_key],
            terms=Strings.of(names[place] for place in by_key.tolist()),
            starts=np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=len(names)))]).astype(np.int64),
            slots=np.repeat(np.arange(len(order), dtype=np.int32), counts[order])[by_term],
            frequencies=np.array(self._frequencies, dtype=np.int32)[taken][by_term],
            lengths=np.array(self._lengths, dtype=np.int64)[order],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Words of which the documents in `masked` (documents,) do not count, as if they had never been taken in."""

    words: Words
    masked: NDArray[np.bool_] | None = None


class Corpus:
    """The documents of several parts counted as one collection; they are numbered through, part after part."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        lengths = np.concatenate([np.zeros(0), *(part.words.lengths for part in parts)])
        masked = [np.zeros(len(part.words.lengths), bool) if part.masked is None else part.masked for part in parts]
        self._masked = np.concatenate([np.zeros(0, dtype=np.bool_), *masked])
        self._any_masked = bool(self._masked.any())
        self.document_count = int(np.count_nonzero(~self._masked))
        # Documents without a single word would make the mean 0; nothing matches them anyway.
        mean = lengths[~self._masked].sum() / max(1, self.document_count) or 1.0
        self._norms = K1 * (1 - B + B * lengths / mean)

    def beside(self, counts: Mapping[str, int]) -> "Corpus":
        """The same documents and one more, given as word -> count, which is numbered last."""
        collector = Collector()
        collector.add(counts)
        return Corpus([*self._parts, Part(words=collector.words(np.zeros(1, dtype=np.int64)))])

    def scores(self, text: str) -> NDArray[np.float64]:
        """Score of every document for a query: text -> (documents,), 0 where no word is shared or it does not count.

        A word that the query repeats counts once.
        """
        words = tuple(dict.fromkeys(cards.tokens(text)))
        found = [part.words.postings(words) for part in self._parts]
        scores = np.zeros(len(self._norms))
        if words and found:
            sizes = np.sum([[place.stop - place.start for place in own] for own in found], axis=0)
            _, firsts = np.unique(np.cumsum(sizes) // _AT_ONCE, return_index=True)
            for first, last in pairwise([*firsts.tolist(), len(words)]):
                scores += self._gains([own[first:last] for own in found])
        scores[self._masked] = 0.0
        return scores

    def idf(self, containing: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weight of terms that so many documents contain: (terms,) -> (terms,)."""
        return np.log1p((self.document_count - containing + 0.5) / (containing + 0.5))

    def _gains(self, found: Sequence[Sequence[slice]]) -> NDArray[np.float64]:
        """What some words add to the score of every document, given as their postings in each part: (documents,)."""
        terms, documents, frequencies, offset = [], [], [], 0
        for part, places in zip(self._parts, found, strict=True):
            terms.append(np.repeat(np.arange(len(places)), [place.stop - place.start for place in places]))
            documents.append(np.concatenate([part.words.slots[place] for place in places]).astype(np.int64) + offset)
            frequencies += [part.words.frequencies[place] for place in places]
            offset += len(part.words.lengths)
        term, document, frequency = np.concatenate(terms), np.concatenate(documents), np.concatenate(frequencies)
        counted = term[~self._masked[document]] if self._any_masked else term
        weights = self.idf(np.bincount(counted, minlength=len(found[0])))
        gains = weights[term] * (frequency * (K1 + 1) / (frequency + self._norms[document]))
        return np.bincount(document, weights=gains, minlength=len(self._norms)).astype(np.float64)
