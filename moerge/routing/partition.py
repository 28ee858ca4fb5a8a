"""Partition: the experts of one base model, searchable by vector and by word, never changed once made.

An expert works on its own base model only, so the base is a wall between partitions and not a filter in one:
an answer for one base cannot hold an expert of another, and word statistics are those of the base alone.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid
from moerge.routing import bm25
from moerge.routing.base import Candidates, Query
from moerge.routing.bm25 import Bm25
from moerge.routing.cards import MAX_EXAMPLES, Entry, centroid, has_instruction
from moerge.routing.index import VectorIndex

# Candidates taken from each side before the exact score: 50 loses nothing that matters against scoring all.
DEPTH = 50

# Vector ids are slot * 64 + row, and an entry has at most 2 + 32 + 1 rows.
_ROWS = 64
assert MAX_EXAMPLES + 3 <= _ROWS


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """Entries in numbered slots; a slot is empty after its expert left and is filled again by the next one."""

    slots: tuple[Entry | None, ...]
    slot_of: Mapping[str, int]
    id_order: NDArray[np.int64]  # (slots,) place of the slot's expert among all ids in order; empty slots come last
    vectors: VectorIndex
    words: Bm25
    tags: Mapping[str, int]  # tag -> its row in tag_centroids
    tag_centroids: NDArray[np.float32]  # (tags, d) unit means of the centroid rows of the experts that carry the tag

    def __len__(self) -> int:
        return len(self.slot_of)

    def entry(self, expert: str) -> Entry:
        """The entry of an expert that is here."""
        found = self.slots[self.slot_of[expert]]
        assert found is not None
        return found

    def candidates(
        self, query: Query, *, depth: int = DEPTH, allow: Collection[str] | None = None, with_tags: bool = False
    ) -> Candidates:
        """The best `depth` experts by vector and the best `depth` by BM25, with all parts of their scores.

        With `allow` every allowed expert of this partition is a candidate, and nobody else. What concerns tags is
        there when asked for.
        """
        words = self.words.scores(query.text)
        if allow is not None:
            chosen = {self.slot_of[expert] for expert in allow if expert in self.slot_of}
        else:
            chosen = set(self._best_by_word(words, depth))
            if query.vector is not None:
                chosen |= set(self._best_by_vector(query.vector, depth))
        slots = sorted(chosen)
        entries = [self._at(slot) for slot in slots]
        found = _measured(query.vector, entries, words[slots])
        if not with_tags or query.vector is None:
            return found
        pairs = [(place, self.tags[tag]) for place, entry in enumerate(entries) for tag in set(entry.card.tags)]
        return replace(
            found,
            tag_cosines=(self.tag_centroids @ query.vector).astype(np.float64),
            tagged=np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2),
        )

    def changed(self, *, put: Iterable[Entry], removed: Collection[str]) -> "Partition":
        """The partition after putting in entries (each replaces all of its expert's) and taking out experts."""
        incoming = {entry.card.expert: entry for entry in put}
        leaving = [expert for expert in {*removed, *incoming} if expert in self.slot_of]
        slots = list(self.slots)
        slot_of = dict(self.slot_of)
        gone: dict[int, Entry] = {}
        for expert in leaving:
            slot = slot_of.pop(expert)
            gone[slot] = self._at(slot)
            slots[slot] = None
        free = sorted((slot for slot, entry in enumerate(slots) if entry is None), reverse=True)
        added: dict[int, Entry] = {}
        for expert in sorted(incoming):
            if free:
                slot = free.pop()
                slots[slot] = incoming[expert]
            else:
                slot = len(slots)
                slots.append(incoming[expert])
            slot_of[expert] = slot
            added[slot] = incoming[expert]
        vectors = self.vectors.copy()
        vectors.remove(_ids(gone))
        if added:
            vectors.add(_rows(added, vectors.dimension), _ids(added))
        words = self.words.changed(
            slot_count=len(slots),
            removed={slot: entry.counts for slot, entry in gone.items()},
            added={slot: entry.counts for slot, entry in added.items()},
        )
        id_order = np.full(len(slots), len(slots), dtype=np.int64)
        id_order[[slot_of[expert] for expert in sorted(slot_of)]] = np.arange(len(slot_of))
        tags, tag_centroids = _tags([entry for entry in slots if entry], vectors.dimension)
        return Partition(
            slots=tuple(slots),
            slot_of=slot_of,
            id_order=id_order,
            vectors=vectors,
            words=words,
            tags=tags,
            tag_centroids=tag_centroids,
        )

    def _at(self, slot: int) -> Entry:
        found = self.slots[slot]
        assert found is not None
        return found

    def _best_by_word(self, words: NDArray[np.float64], depth: int) -> list[int]:
        found = np.flatnonzero(words > 0)
        order = np.lexsort((self.id_order[found], -words[found]))
        return [int(slot) for slot in found[order[:depth]]]

    def _best_by_vector(self, vector: NDArray[np.float32], depth: int) -> list[int]:
        """Slots of the `depth` experts with the nearest vectors; asks for more vectors until there are enough."""
        wanted = min(depth, len(self))
        k = 4 * wanted
        while True:
            _, ids = self.vectors.search(vector, k)
            slots = list(dict.fromkeys(int(found) // _ROWS for found in ids))
            if len(slots) >= wanted or k >= len(self.vectors):
                return slots[:wanted]
            k *= 4


def empty(dimension: int) -> Partition:
    """A partition without experts for vectors of this width."""
    return Partition(
        slots=(),
        slot_of={},
        id_order=np.zeros(0, dtype=np.int64),
        vectors=VectorIndex(dimension),
        words=bm25.EMPTY,
        tags={},
        tag_centroids=np.zeros((0, dimension), dtype=np.float32),
    )


def _tags(entries: Iterable[Entry], dimension: int) -> tuple[dict[str, int], NDArray[np.float32]]:
    """Numbers of all tags in order of the alphabet, and their centroids: (tags, d)."""
    members: dict[str, list[NDArray[np.float32]]] = {}
    for entry in entries:
        for tag in set(entry.card.tags):
            members.setdefault(tag, []).append(entry.vectors[1])
    centroids = [centroid(np.array(members[tag])) for tag in sorted(members)]
    numbers = {tag: number for number, tag in enumerate(sorted(members))}
    return numbers, np.array(centroids, dtype=np.float32).reshape(-1, dimension)


def _measured(vector: NDArray[np.float32] | None, entries: list[Entry], words: NDArray[np.float64]) -> Candidates:
    """All parts of the score for these entries, exactly: cosines from the entries' own vectors."""
    count = len(entries)
    experts = tuple(entry.card.expert for entry in entries)
    if vector is None or not count:
        none, nobody = np.zeros(count), np.full(count, -1, dtype=np.int64)
        return Candidates(
            experts=experts,
            s_ex=none,
            s_desc=none,
            s_cen=none,
            s_ins=none,
            bm25=words,
            matched=nobody,
            has_vector=False,
        )
    cosines = (np.concatenate([entry.vectors for entry in entries]) @ vector).astype(np.float64)
    lengths = np.array([len(entry.vectors) for entry in entries])
    starts = np.cumsum(lengths) - lengths
    s_desc, s_cen = cosines[starts], cosines[starts + 1]
    instructed = np.array([has_instruction(entry.card) for entry in entries])
    last = starts + lengths - 1
    s_ins = np.where(instructed, cosines[last], s_desc)
    cosines[last[instructed]] = -np.inf
    has_examples = lengths - instructed > 2
    # Only example rows compete for s_ex; where there are none, the description's row is left to win.
    cosines[starts + 1] = -np.inf
    cosines[starts[has_examples]] = -np.inf
    s_ex = np.maximum.reduceat(cosines, starts)
    winners = np.flatnonzero(cosines == np.repeat(s_ex, lengths))
    _, first = np.unique(np.repeat(np.arange(count), lengths)[winners], return_index=True)
    matched = np.where(has_examples, winners[first] - starts - 2, -1)
    return Candidates(experts=experts, s_ex=s_ex, s_desc=s_desc, s_cen=s_cen, s_ins=s_ins, bm25=words, matched=matched)


def _ids(entries: Mapping[int, Entry]) -> NDArray[np.int64]:
    return np.array(
        [slot * _ROWS + row for slot, entry in entries.items() for row in range(len(entry.vectors))], dtype=np.int64
    )


def _rows(entries: Mapping[int, Entry], dimension: int) -> NDArray[np.float32]:
    for entry in entries.values():
        if entry.vectors.shape[1] != dimension:
            raise IndexInvalid(
                f"{entry.card.expert} has vectors of another width than the index",
                pointer=entry.card.expert,
                met=entry.vectors.shape[1],
                wanted=dimension,
                remedy="encode the card with the encoder of this index",
            )
    return np.concatenate([entry.vectors for entry in entries.values()])
