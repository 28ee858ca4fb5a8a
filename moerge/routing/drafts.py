"""Drafts: where a card that is not in the index would stand if it were there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moerge import routing
from moerge.routing import cards
from moerge.routing.base import Query
from moerge.routing.cards import Card, Entry
from moerge.routing.partition import DEPTH, Partition
from moerge.routing.state import DEFAULT_STRATEGY, DIGITS, State


@dataclass(frozen=True, kw_only=True)
class Rival:
    """An expert that scores as high as the draft or higher; `revision` is its revision's number in the hub."""

    expert: str
    revision: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The draft's score for a query, the default threshold, and who comes before it, best first.

    Equal scores count against the draft. Rivals are found as candidates of a route are, so there may be more of them
    where there are as many as the depth.
    """

    score: float
    min_score: float
    rivals: tuple[Rival, ...]


def standing(state: State, draft: Entry, query: Query, *, depth: int = DEPTH) -> Standing:
    """Where a draft stands by the default strategy, as if it were one more expert of its base model.

    An expert of the draft's id is not there: the draft replaces it.
    """
    part = state.partitions.get(draft.card.base_model) or Partition(dimension=state.dimension)
    part = part.changed(removed={draft.card.expert})
    chosen = routing.catalogue()[DEFAULT_STRATEGY]
    words = part.corpus.beside(draft.counts).scores(query.text)
    alone = Partition(dimension=part.dimension, added={draft.card.expert: draft}).find(query)
    score = chosen.score(query, replace(alone.candidates, bm25=words[-1:])).round(DIGITS)[0]
    found = part.find(query, depth=depth, words=words[:-1])
    scores = chosen.score(query, found.candidates).round(DIGITS)
    order = np.argsort(-scores, kind="stable")
    return Standing(
        score=float(score),
        min_score=state.spec(chosen.SPEC).threshold(len(part) + 1),
        rivals=tuple(
            Rival(
                expert=found.candidates.experts[place],
                revision=part.revision(int(found.slots[place])),
                score=float(scores[place]),
            )
            for place in order[scores[order] >= score]
        ),
    )


def without_each_example(card: Card, vectors: NDArray[np.float32]) -> Iterator[Entry]:
    """For each used example the card without it and without its equals: `vectors` are those of `cards.texts(card)`."""
    examples = cards.used_examples(card)
    for text in examples:
        kept = [place for place, other in enumerate(examples) if other.strip() != text.strip()]
        others = range(len(examples) + 1, len(vectors))
        rows = vectors[[0, *(place + 1 for place in kept), *others]]
        yield cards.entry(replace(card, examples=tuple(examples[place] for place in kept)), rows)
