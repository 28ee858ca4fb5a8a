"""Partition: the experts of one base model, searchable by vector and by word, never changed once made.

An expert works on its own base model only, so the base is a wall between partitions and not a filter in one:
an answer for one base cannot hold an expert of another, and word statistics are those of the base alone.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moerge.routing import bm25
from moerge.routing.base import Candidates, Query
from moerge.routing.cards import Card, Entry
from moerge.routing.ragged import ranges
from moerge.routing.segment import Segment

# Candidates taken from each side before the exact score: 50 loses nothing that matters against scoring all.
DEPTH = 50

# Where fewer than this share passes a filter, comparing all that pass takes less time than searching for them.
_FEW = 0.1
# How many rows a search asks for first, how much more of them with a filter, and at most where it is not exact.
_FIRST_ROWS = 200
_MORE = 3
_MOST_ROWS = 5_000

# The same vectors multiplied in another order differ in the eighth digit; six digits make equal rows tie.
_DIGITS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Candidates in ascending order of their ids, the slot of each, and whether nobody else could be a candidate."""

    candidates: Candidates
    slots: NDArray[np.int64]
    exhausted: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tags:
    """Tags of a partition: unit centroids (tags, d), and of each part of it which of them its own tags are."""

    centroids: NDArray[np.float32]
    numbers: tuple[NDArray[np.int64], ...]


class Partition:
    """A segment, the entries put in since it was built, and the slots of the segment that are gone or replaced.

    Slots are numbered through: first those of the segment, then those of the entries.
    """

    def __init__(
        self,
        *,
        dimension: int,
        base: Segment | None = None,
        masked: NDArray[np.bool_] | None = None,
        added: Mapping[str, Entry] | None = None,
    ) -> None:
        self.dimension = dimension
        self.base = Segment.build((), dimension=dimension) if base is None else base
        self.masked = np.zeros(len(self.base), dtype=np.bool_) if masked is None else masked
        self.added: Mapping[str, Entry] = added or {}
        # It is rebuilt at every change and small, and a flat index is built at once.
        self.overlay = Segment.build(self.added.values(), dimension=dimension, flat_limit=len(self.added) * 64)
        self._parts = (self.base, self.overlay)
        self._offsets = (0, len(self.base))
        self._alive = np.concatenate([~self.masked, np.ones(len(self.overlay), dtype=np.bool_)])
        self._count = int(np.count_nonzero(self._alive))
        self.corpus = bm25.Corpus(
            [bm25.Part(words=self.base.words, masked=self.masked), bm25.Part(words=self.overlay.words)]
        )
        before = np.array([self.base.experts.place(expert) for expert in self.overlay.experts], dtype=np.int64)
        shift = np.searchsorted(before, np.arange(len(self.base)), side="right")
        # (slots,) the place of each slot's expert among all ids in order, by which ties are broken.
        self._places = np.concatenate([np.arange(len(self.base)) + shift, before + np.arange(len(self.overlay))])

    def __len__(self) -> int:
        return self._count

    @property
    def overlay_count(self) -> int:
        """How many experts were put in, replaced or taken out since the segment was built."""
        replaced = sum(self.base.experts.find(expert) >= 0 for expert in self.added)
        return len(self.added) + int(np.count_nonzero(self.masked)) - replaced

    def experts(self) -> tuple[str, ...]:
        """The ids of all experts here, ascending."""
        slots = np.flatnonzero(self._alive)
        return self._ids(slots[np.argsort(self._places[slots])])

    def card(self, expert: str) -> Card:
        """The card of an expert that is here."""
        part, slot = self._place(self._slot(expert))
        return part.card(slot)

    def entry(self, expert: str) -> Entry:
        """The card of an expert that is here with its vectors."""
        part, slot = self._place(self._slot(expert))
        return part.entry(slot)

    def number(self, slot: int) -> int:
        """The hub's number of the expert in a slot."""
        part, own = self._place(slot)
        return int(part.numbers[own])

    def revision(self, slot: int) -> int:
        """The hub's number of the revision in a slot."""
        part, own = self._place(slot)
        return int(part.revisions[own])

    def changed(
        self, *, put: Iterable[Entry] = (), removed: Collection[str] = (), withdrawn: Collection[int] = ()
    ) -> "Partition":
        """The partition after taking out experts by id and by number and then putting in entries.

        An entry replaces whatever stands under its id or under its number. The same partition when nothing changes.
        """
        incoming = {entry.card.expert: entry for entry in put}
        ids = {*removed, *incoming}
        numbers = {*withdrawn, *(entry.card.number for entry in incoming.values())} - {0}
        kept = {
            expert: entry
            for expert, entry in self.added.items()
            if expert not in ids and entry.card.number not in numbers
        }
        masked = self.masked | np.isin(self.base.numbers, np.array(sorted(numbers), dtype=np.int64))
        slots = [self.base.experts.find(expert) for expert in ids]
        masked[[slot for slot in slots if slot >= 0]] = True
        if not incoming and len(kept) == len(self.added) and np.array_equal(masked, self.masked):
            return self
        return Partition(dimension=self.dimension, base=self.base, masked=masked, added={**kept, **incoming})

    def find(
        self,
        query: Query,
        *,
        depth: int = DEPTH,
        allow: NDArray[np.int64] | None = None,
        with_tags: bool = False,
        words: NDArray[np.float64] | None = None,
    ) -> Found:
        """The best `depth` experts by vector and the best `depth` by BM25, with all parts of their scores.

        With `allow` only experts of these numbers are candidates, and all of them where they are few. What concerns
        tags is there when asked for. `words` are scores of BM25 by slot where they are not those of `corpus`.
        """
        words = self.corpus.scores(query.text) if words is None else words
        passing = self._alive
        if allow is not None:
            passing = passing & np.concatenate([np.isin(part.numbers, allow) for part in self._parts])
        count = int(np.count_nonzero(passing))
        few = allow is not None and count < _FEW * self._count
        if few or (count <= depth and (allow is not None or query.vector is not None)):
            slots = np.flatnonzero(passing)
        else:
            slots = self._best_by_word(np.where(passing, words, 0.0), depth)
            if query.vector is not None:
                slots = np.union1d(slots, self._best_by_vector(query.vector, depth, passing))
        slots = slots[np.argsort(self._places[slots])]
        candidates = self._measured(query.vector, slots, words[slots], with_tags=with_tags)
        return Found(candidates=candidates, slots=slots, exhausted=few or count <= depth)

    def _slot(self, expert: str) -> int:
        for part, offset in reversed(tuple(zip(self._parts, self._offsets, strict=True))):
            slot = part.experts.find(expert)
            if slot >= 0 and self._alive[offset + slot]:
                return offset + slot
        raise KeyError(expert)

    def _place(self, slot: int) -> tuple[Segment, int]:
        """The part that a slot is in and its number there."""
        part = int(slot >= len(self.base))
        return self._parts[part], slot - self._offsets[part]

    def _ids(self, slots: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(part.experts[own] for part, own in map(self._place, slots.tolist()))

    def _best_by_word(self, words: NDArray[np.float64], depth: int) -> NDArray[np.int64]:
        found = np.flatnonzero(words > 0)
        if len(found) > depth:
            found = found[words[found] >= -np.partition(-words[found], depth - 1)[depth - 1]]
        return found[np.lexsort((self._places[found], -words[found]))][:depth]

    def _best_by_vector(self, vector: NDArray[np.float32], depth: int, passing: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Slots of the `depth` passing experts with the nearest rows."""
        pairs = [
            _near(part, vector, depth, passing[offset : offset + len(part)])
            for part, offset in zip(self._parts, self._offsets, strict=True)
        ]
        scores = np.concatenate([scores for scores, _ in pairs])
        slots = np.concatenate([slots + offset for (_, slots), offset in zip(pairs, self._offsets, strict=True)])
        slots = slots[np.lexsort((self._places[slots], -np.round(scores, _DIGITS)))]
        _, first = np.unique(slots, return_index=True)
        return slots[np.sort(first)][:depth]

    def _measured(
        self,
        vector: NDArray[np.float32] | None,
        slots: NDArray[np.int64],
        words: NDArray[np.float64],
        *,
        with_tags: bool,
    ) -> Candidates:
        """All parts of the score for these slots, exactly."""
        experts = self._ids(slots)
        if vector is None:
            none = np.zeros(len(slots))
            return Candidates(
                experts=experts,
                s_ex=none,
                s_desc=none,
                s_cen=none,
                s_ins=none,
                bm25=words,
                matched=np.full(len(slots), -1, dtype=np.int64),
                has_vector=False,
            )
        columns = np.empty((5, len(slots)))
        for part, offset in zip(self._parts, self._offsets, strict=True):
            mine = (slots >= offset) & (slots < offset + len(part))
            columns[:, mine] = _cosines(part, vector, slots[mine] - offset)
        s_ex, s_desc, s_cen, s_ins, matched = columns
        tags = self._tags if with_tags else None
        return Candidates(
            experts=experts,
            s_ex=s_ex,
            s_desc=s_desc,
            s_cen=s_cen,
            s_ins=s_ins,
            bm25=words,
            matched=matched.astype(np.int64),
            tag_cosines=np.zeros(0) if tags is None else (tags.centroids @ vector).astype(np.float64),
            tagged=np.zeros((0, 2), dtype=np.int64) if tags is None else self._tagged(slots, tags),
        )

    def _tagged(self, slots: NDArray[np.int64], tags: _Tags) -> NDArray[np.int64]:
        """One row (place of the slot, tag) for each tag of these slots, in ascending order: (n,) -> (m, 2)."""
        pairs = [np.zeros((0, 2), dtype=np.int64)]
        for part, offset, numbers in zip(self._parts, self._offsets, tags.numbers, strict=True):
            mine = np.flatnonzero((slots >= offset) & (slots < offset + len(part)))
            own = slots[mine] - offset
            lengths = part.tag_starts[own + 1] - part.tag_starts[own]
            pairs.append(np.stack([np.repeat(mine, lengths), numbers[_tags_of(part, own)]], axis=1))
        joined = np.concatenate(pairs)
        return joined[np.lexsort((joined[:, 1], joined[:, 0]))]

    @cached_property
    def _tags(self) -> _Tags:
        gone = (np.flatnonzero(self.masked), np.zeros(0, dtype=np.int64))
        counts = [_tag_counts(part) - _tag_counts(part, slots) for part, slots in zip(self._parts, gone, strict=True)]
        names = [list(part.tags) for part in self._parts]
        used = {
            name
            for own, tally in zip(names, counts, strict=True)
            for name, count in zip(own, tally, strict=True)
            if count
        }
        place = {name: number for number, name in enumerate(sorted(used))}
        numbers = tuple(np.array([place.get(name, -1) for name in own], dtype=np.int64) for own in names)
        sums = np.zeros((len(place), self.dimension))
        for part, slots, own in zip(self._parts, gone, numbers, strict=True):
            left = part.tag_sums.astype(np.float64)
            lengths = part.tag_starts[slots + 1] - part.tag_starts[slots]
            np.subtract.at(left, _tags_of(part, slots), part.vectors.rows[np.repeat(part.starts[slots] + 1, lengths)])
            sums[own[own >= 0]] += left[own >= 0]
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        # Opposite experts leave next to nothing, which has no direction.
        return _Tags(centroids=(sums / np.where(norms > 1e-6, norms, np.inf)).astype(np.float32), numbers=numbers)


def _tags_of(part: Segment, slots: NDArray[np.int64]) -> NDArray[np.int32]:
    return part.tag_of[ranges(part.tag_starts[slots], part.tag_starts[slots + 1])]


def _tag_counts(part: Segment, slots: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """How many experts of a part (of these slots) carry each tag: (tags,)."""
    return np.bincount(part.tag_of if slots is None else _tags_of(part, slots), minlength=len(part.tags))


def _near(
    part: Segment, vector: NDArray[np.float32], depth: int, passing: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Inner products and slots of the rows nearest to a vector, until they belong to `depth` passing experts.

    Asks for more rows until there are enough, and where a search that is not exact does not find them, compares all.
    """
    count = int(np.count_nonzero(passing))
    wanted = min(depth, count)
    if not wanted:
        return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
    asked = int(max(_FIRST_ROWS, 4 * wanted) * min(_MORE, len(part) / count))
    while True:
        scores, rows = part.vectors.search(vector, asked)
        slots = part.slots_of(rows)
        kept = passing[slots]
        if len(rows) == len(part.vectors) or len(np.unique(slots[kept])) >= wanted:
            # Of equal rows faiss gives the first ones, which belong to the smallest ids.
            return scores[kept], slots[kept]
        if not part.vectors.exact and (len(rows) < asked or asked >= _MOST_ROWS):
            rows = part.rows_of(np.flatnonzero(passing))
            return part.vectors.scores(vector, rows), part.slots_of(rows)
        asked *= 4


def _cosines(part: Segment, vector: NDArray[np.float32], slots: NDArray[np.int64]) -> NDArray[np.float64]:
    """s_ex, s_desc, s_cen, s_ins and the place of the best example (-1: none) of these slots: (5, n)."""
    if not len(slots):
        return np.empty((5, 0))
    cosines = part.vectors.scores(vector, part.rows_of(slots)).astype(np.float64)
    lengths = part.starts[slots + 1] - part.starts[slots]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    instructed = part.instructed[slots]
    s_desc, s_cen = cosines[starts], cosines[starts + 1]
    s_ins = np.where(instructed, cosines[ends - 1], s_desc)
    has_examples = lengths - instructed > 2
    # Only example rows compete for s_ex; where there are none, the description's row is left to win.
    cosines[starts + 1] = -np.inf
    cosines[starts[has_examples]] = -np.inf
    cosines[ends[instructed] - 1] = -np.inf
    s_ex = np.maximum.reduceat(cosines, starts)
    winners = np.flatnonzero(cosines == np.repeat(s_ex, lengths))
    _, first = np.unique(np.repeat(np.arange(len(slots)), lengths)[winners], return_index=True)
    matched = np.where(has_examples, winners[first] - starts - 2, -1)
    return np.stack([s_ex, s_desc, s_cen, s_ins, matched])
