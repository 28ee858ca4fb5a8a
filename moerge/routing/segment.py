"""Segment: the experts of one base model as columns, built once and never changed, in memory or mapped from files.

Slots number the experts in ascending order of their ids, so the order of slots is the order of ties.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid
from moerge.routing import cards
from moerge.routing.bm25 import Collector, Words
from moerge.routing.cards import Card, Entry
from moerge.routing.index import FLAT_LIMIT, GRAPH_LIMIT, VectorIndex
from moerge.routing.ragged import Strings, ranges

Columns = Mapping[str, NDArray[Any]]


class Segment:
    """Experts in slots 0 to n - 1, their texts, words, tags and vectors.

    The rows of slot s are `starts[s]` to `starts[s + 1]`: description, centroid of the examples (the description
    again where there are none), the examples, and last the instruction where `instructed[s]`.
    The tags of slot s are `tags[t]` for t in `tag_of[tag_starts[s]:tag_starts[s + 1]]`.
    """

    def __init__(self, columns: Columns, vectors: VectorIndex) -> None:
        self.columns = columns
        self.vectors = vectors
        self.experts = _strings(columns, "experts")
        self.numbers: NDArray[np.int64] = columns["numbers"]
        self.revisions: NDArray[np.int64] = columns["revisions"]
        self.starts: NDArray[np.int64] = columns["starts"]
        self.instructed: NDArray[np.bool_] = columns["instructed"]
        self.words = Words(
            keys=columns["term_keys"],
            terms=_strings(columns, "terms"),
            starts=columns["term_starts"],
            slots=columns["posting_slots"],
            frequencies=columns["posting_frequencies"],
            lengths=columns["lengths"],
        )
        self.tags = _strings(columns, "tags")
        self.tag_sums: NDArray[np.float32] = columns["tag_sums"]  # (tags, d) sum of the centroids of each tag's experts
        self.tag_starts: NDArray[np.int64] = columns["tag_starts"]
        self.tag_of: NDArray[np.int32] = columns["tag_of"]
        self._cards = _strings(columns, "cards")

    @classmethod
    def build(
        cls, entries: Iterable[Entry], *, dimension: int, flat_limit: int = FLAT_LIMIT, graph_limit: int = GRAPH_LIMIT
    ) -> "Segment":
        """A segment of entries of one base in any order; they are read one by one and not kept.

        `flat_limit` and `graph_limit` are those of `VectorIndex.build`. Raises IndexInvalid for vectors of another
        width and for two entries of one expert.
        """
        words = Collector()
        rows: list[NDArray[np.float16]] = []
        known: list[Card] = []
        for entry in entries:
            if entry.vectors.shape[1] != dimension:
                raise IndexInvalid(
                    f"{entry.card.expert} has vectors of another width than the index",
                    pointer=entry.card.expert,
                    met=entry.vectors.shape[1],
                    wanted=dimension,
                    remedy="encode the card with the encoder of this index",
                )
            words.add(entry.counts)
            rows.append(entry.vectors.astype(np.float16))
            known.append(entry.card)
        order = sorted(range(len(known)), key=lambda place: known[place].expert)
        known = [known[place] for place in order]
        rows = [rows[place] for place in order]
        for first, second in itertools.pairwise(known):
            if first.expert == second.expert:
                raise IndexInvalid(f"{first.expert} stands twice", pointer=first.expert, remedy="put it in once")
        columns = {
            "numbers": np.array([card.number for card in known], dtype=np.int64),
            "revisions": np.array([card.revision for card in known], dtype=np.int64),
            "starts": _starts(len(own) for own in rows),
            "instructed": np.array([cards.has_instruction(card) for card in known], dtype=np.bool_),
            **_packed("experts", (card.expert for card in known)),
            **_packed("cards", (json.dumps(dataclasses.asdict(card)) for card in known)),
            **_word_columns(words.words(np.array(order, dtype=np.int64))),
            **_tag_columns(known, rows, dimension),
        }
        matrix = np.concatenate([np.zeros((0, dimension), dtype=np.float16), *rows])
        rows.clear()
        columns["rows"] = matrix
        return cls(columns, VectorIndex.build(matrix, flat_limit=flat_limit, graph_limit=graph_limit))

    def __len__(self) -> int:
        return len(self.numbers)

    def card(self, slot: int) -> Card:
        """The card of the expert in a slot."""
        fields: dict[str, Any] = json.loads(self._cards[slot])
        return Card(**fields | {name: tuple(fields[name]) for name in ("examples", "tags")})

    def entry(self, slot: int) -> Entry:
        """The card of the expert in a slot with its vectors."""
        return cards.restored(self.card(slot), self.vectors.rows[self.starts[slot] : self.starts[slot + 1]])

    def slots_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slot that each row belongs to: (m,) -> (m,)."""
        # The end of a slot is the first row that is not its own.
        return np.asarray(np.searchsorted(self.starts[1:], rows, side="right"), dtype=np.int64)

    def rows_of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """All rows of these slots, slot after slot."""
        return ranges(self.starts[slots], self.starts[slots + 1])


def _packed(name: str, texts: Iterable[str]) -> dict[str, NDArray[Any]]:
    packed = Strings.of(texts)
    return {name: packed.blob, f"{name}_offsets": packed.offsets}


def _strings(columns: Columns, name: str) -> Strings:
    return Strings(blob=columns[name], offsets=columns[f"{name}_offsets"])


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))]).astype(np.int64)


def _word_columns(words: Words) -> dict[str, NDArray[Any]]:
    return {
        "term_keys": words.keys,
        "terms": words.terms.blob,
        "terms_offsets": words.terms.offsets,
        "term_starts": words.starts,
        "posting_slots": words.slots,
        "posting_frequencies": words.frequencies,
        "lengths": words.lengths,
    }


def _tag_columns(known: list[Card], rows: list[NDArray[np.float16]], dimension: int) -> dict[str, NDArray[Any]]:
    own = [tuple(dict.fromkeys(card.tags)) for card in known]
    names = sorted({tag for tags in own for tag in tags})
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(names), dimension), dtype=np.float64)
    for tags, vectors in zip(own, rows, strict=True):
        for tag in tags:
            sums[place[tag]] += vectors[1]
    return {
        **_packed("tags", names),
        "tag_sums": sums.astype(np.float32),
        "tag_starts": _starts(len(tags) for tags in own),
        "tag_of": np.array([place[tag] for tags in own for tag in tags], dtype=np.int32),
    }
