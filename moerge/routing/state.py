"""State: all that a router knows at one moment, and the one function that ranks experts for a query.

The hub's router and `bin/bench routing` both call `State.rank`, so what is measured is what is served.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moerge import routing
from moerge.errors import QueryInvalid
from moerge.routing import partition
from moerge.routing.base import Candidates, Query, Spec
from moerge.routing.cards import Entry
from moerge.routing.partition import DEPTH, Partition

DEFAULT_STRATEGY = "hybrid"

# The same vectors multiplied in another order differ in the eighth digit. Six digits make equal cards tie on
# every machine, and a tie goes to the smaller expert id.
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One scored expert: `parts` holds s_ex, s_desc, s_cen (absent without query vector) and bm25.

    `matched_example_index` counts the card's used examples from 0; None where no example was compared.
    """

    expert: str
    number: int
    revision: int
    base_model: str
    score: float
    confidence: str
    parts: Mapping[str, float]
    matched_example_index: int | None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Hits, best first, and how they were found; `exhausted` when a greater depth and limit would find no others.

    `strategy` differs from the one asked for when that needs a query vector and there was none.
    `min_score` is the strategy's threshold among as many experts as were asked.
    """

    hits: tuple[Hit, ...]
    strategy: Spec
    min_score: float
    exhausted: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """Partitions by base model as of change number `seq`, all vectors from one encoder. Never changed once made."""

    encoder_id: str
    dimension: int
    seq: int = 0
    partitions: Mapping[str, Partition] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(part) for part in self.partitions.values())

    def changed(self, *, seq: int, put: Iterable[Entry] = (), removed: Collection[str] = ()) -> "State":
        """The state after a set of changes: each entry put in replaces all of its expert's, on whatever base it was."""
        incoming: dict[str, dict[str, Entry]] = {}
        for entry in {entry.card.expert: entry for entry in put}.values():
            incoming.setdefault(entry.card.base_model, {})[entry.card.expert] = entry
        leaving = {*removed, *(expert for entries in incoming.values() for expert in entries)}
        partitions = dict(self.partitions)
        for base in {*partitions, *incoming}:
            old = partitions.get(base) or partition.empty(self.dimension)
            mine = incoming.get(base, {})
            out = {expert for expert in leaving if expert in old.slot_of}
            if mine or out:
                new = old.changed(put=mine.values(), removed=out)
                partitions[base] = new
                if not len(new):
                    del partitions[base]
        return State(encoder_id=self.encoder_id, dimension=self.dimension, seq=seq, partitions=partitions)

    def rank(
        self,
        query: Query,
        *,
        base_model: str | None = None,
        strategy: str = DEFAULT_STRATEGY,
        depth: int = DEPTH,
        limit: int | None = None,
        allow: Collection[str] | None = None,
    ) -> Ranking:
        """Score the candidates of one base model (of every base when None), best first, ties by expert id.

        At most `limit` hits; None gives all candidates. Raises QueryInvalid for an unknown strategy.
        """
        members = routing.catalogue()
        if strategy not in members:
            raise QueryInvalid(
                f"there is no strategy {strategy!r}",
                pointer="/strategy",
                met=strategy,
                wanted=sorted(members),
                remedy="name one of the strategies listed",
            )
        chosen = members[strategy]
        if chosen.SPEC.needs_vector and query.vector is None:
            chosen = members["bm25"]
        if base_model is None:
            parts = list(self.partitions.values())
        else:
            parts = [self.partitions[base_model]] if base_model in self.partitions else []
        hits: list[Hit] = []
        for part in parts:
            candidates = part.candidates(query, depth=depth, allow=allow, with_tags=chosen.SPEC.needs_tags)
            scores = np.round(chosen.score(query, candidates), _DIGITS)
            order = np.lexsort((np.array(candidates.experts, dtype=object), -scores))
            order = order if limit is None else order[: limit + 1]
            hits.extend(_hit(part, candidates, int(place), float(scores[place]), chosen.SPEC) for place in order)
        hits.sort(key=lambda hit: (-hit.score, hit.expert))
        # One more than asked for was kept of each partition, which tells whether the limit hides any.
        exhausted = (allow is not None or all(depth >= len(part) for part in parts)) and (
            limit is None or len(hits) <= limit
        )
        min_score = chosen.SPEC.threshold(max((len(part) for part in parts), default=1))
        return Ranking(hits=tuple(hits[:limit]), strategy=chosen.SPEC, min_score=min_score, exhausted=exhausted)


def _hit(part: Partition, candidates: Candidates, place: int, score: float, spec: Spec) -> Hit:
    card = part.entry(candidates.experts[place]).card
    parts = {"bm25": round(float(candidates.bm25[place]), _DIGITS)}
    if candidates.has_vector:
        for name in ("s_ex", "s_desc", "s_cen"):
            parts[name] = round(float(getattr(candidates, name)[place]), _DIGITS)
    matched = int(candidates.matched[place])
    return Hit(
        expert=card.expert,
        number=card.number,
        revision=card.revision,
        base_model=card.base_model,
        score=score,
        confidence=spec.confidence(score),
        parts=parts,
        matched_example_index=matched if matched >= 0 else None,
    )
