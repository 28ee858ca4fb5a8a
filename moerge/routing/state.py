"""State: all that a router knows at one moment, and the one function that ranks experts for a query.

The hub's router and `bin/bench routing` both call `State.rank`, so what is measured is what is served.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerge import routing
from moerge.errors import QueryInvalid
from moerge.routing.base import Query, Spec
from moerge.routing.cards import Entry
from moerge.routing.partition import DEPTH, Found, Partition
from moerge.routing.segment import Segment

DEFAULT_STRATEGY = "hybrid"

# The same vectors multiplied in another order differ in the eighth digit. Six digits make equal cards tie on
# every machine, and a tie goes to the smaller expert id.
DIGITS = 6

# How far from 1 the length of a vector made by a client may be.
UNIT_TOLERANCE = 1e-3


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
    """Partitions by base model as of change number `seq`, all vectors from one encoder. Never changed once made.

    `thresholds` holds, by name of a strategy, those of its thresholds that are others with this encoder.
    """

    encoder_id: str
    dimension: int
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seq: int = 0
    partitions: Mapping[str, Partition] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(part) for part in self.partitions.values())

    @classmethod
    def based_on(
        cls,
        segments: Mapping[str, Segment],
        *,
        seq: int,
        encoder_id: str,
        dimension: int,
        thresholds: Mapping[str, Mapping[str, float]] | None = None,
    ) -> "State":
        """The state of a snapshot, given as base model -> segment."""
        partitions = {name: Partition(dimension=dimension, base=segment) for name, segment in segments.items()}
        return cls(
            encoder_id=encoder_id, dimension=dimension, thresholds=thresholds or {}, seq=seq, partitions=partitions
        )

    @property
    def overlay_count(self) -> int:
        """How many experts were put in, replaced or taken out since the segments were built."""
        return sum(part.overlay_count for part in self.partitions.values())

    def changed(
        self,
        *,
        seq: int,
        put: Iterable[Entry] = (),
        removed: Collection[str] = (),
        withdrawn: Collection[int] = (),
    ) -> "State":
        """The state after taking out experts, by id (`removed`) and by number (`withdrawn`), and putting in entries.

        An entry replaces all that stands under its expert's id and all that stands under its number, on whatever base;
        of two entries of one id the later one counts. So a renamed expert leaves nothing behind.
        """
        incoming: dict[str, list[Entry]] = {}
        entries = {entry.card.expert: entry for entry in put}
        for entry in entries.values():
            incoming.setdefault(entry.card.base_model, []).append(entry)
        ids = {*removed, *entries}
        numbers = {*withdrawn, *(entry.card.number for entry in entries.values())}
        partitions = {}
        for name in {*self.partitions, *incoming}:
            old = self.partitions.get(name) or Partition(dimension=self.dimension)
            new = old.changed(put=incoming.get(name, ()), removed=ids, withdrawn=numbers)
            if len(new):
                partitions[name] = new
        return replace(self, seq=seq, partitions=partitions)

    def spec(self, spec: Spec) -> Spec:
        """A strategy's SPEC with the thresholds that hold for this encoder."""
        changed: dict[str, Any] = dict(self.thresholds.get(spec.name, {}))
        return replace(spec, **changed)

    def vector(self, values: Sequence[float], *, encoder_id: str) -> NDArray[np.float32]:
        """A query vector that somebody else made: (d,) values of length 1, give or take a thousandth, as float32.

        Raises QueryInvalid for one of another encoder, another width or another length, and where a value is no number.
        """
        if encoder_id != self.encoder_id:
            raise _no_vector("a vector of another encoder", "/embedding_model", encoder_id, self.encoder_id)
        if len(values) != self.dimension:
            raise _no_vector(
                "a vector of another width", "/vector", f"{len(values)} values", f"{self.dimension} values"
            )
        vector = np.asarray(values, dtype=np.float64)
        if not np.isfinite(vector).all():
            place = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise _no_vector("a value is no number", f"/vector/{place}", str(vector[place]), "a finite number")
        length = float(np.linalg.norm(vector))
        if not abs(length - 1) <= UNIT_TOLERANCE:
            raise _no_vector("a vector that is not of length 1", "/vector", f"length {length:.6g}", "length 1 +- 0.001")
        return vector.astype(np.float32)

    def rank(
        self,
        query: Query,
        *,
        base_model: str | None = None,
        strategy: str = DEFAULT_STRATEGY,
        depth: int = DEPTH,
        limit: int | None = None,
        allow: Collection[int] | NDArray[np.int64] | None = None,
    ) -> Ranking:
        """Score the candidates of one base model (of every base when None), best first, ties by expert id.

        At most `limit` hits; None gives all candidates. With `allow` only experts of these numbers. Raises QueryInvalid
        for an unknown strategy.
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
        spec = self.spec(chosen.SPEC)
        if base_model is None:
            parts = self.partitions
        else:
            parts = {base_model: self.partitions[base_model]} if base_model in self.partitions else {}
        numbers = None if allow is None else np.fromiter(allow, dtype=np.int64)
        hits: list[Hit] = []
        exhausted = True
        for name, part in parts.items():
            found = part.find(query, depth=depth, allow=numbers, with_tags=spec.needs_tags)
            scores = np.round(chosen.score(query, found.candidates), DIGITS)
            # Candidates come in the order of their ids, which a stable sort keeps among equals.
            order = np.argsort(-scores, kind="stable")
            # One more than asked for tells whether the limit hides any.
            order = order if limit is None else order[: limit + 1]
            hits.extend(
                Hit(
                    base_model=name,
                    score=float(scores[place]),
                    confidence=spec.confidence(float(scores[place]), len(part)),
                    **_told(part, found, int(place)),
                )
                for place in order
            )
            exhausted = exhausted and found.exhausted
        hits.sort(key=lambda hit: (-hit.score, hit.expert))
        return Ranking(
            hits=tuple(hits[:limit]),
            strategy=spec,
            min_score=spec.threshold(max((len(part) for part in parts.values()), default=1)),
            exhausted=exhausted and (limit is None or len(hits) <= limit),
        )


def _no_vector(detail: str, pointer: str, met: str, wanted: str) -> QueryInvalid:
    return QueryInvalid(
        detail, pointer=pointer, met=met, wanted=wanted, remedy="encode with the encoder named and send its unit vector"
    )


def _told(part: Partition, found: Found, place: int) -> dict[str, Any]:
    """What a hit says of its expert whatever the strategy."""
    candidates = found.candidates
    slot = int(found.slots[place])
    names = ("bm25", "s_ex", "s_desc", "s_cen") if candidates.has_vector else ("bm25",)
    matched = int(candidates.matched[place])
    return {
        "expert": candidates.experts[place],
        "number": part.number(slot),
        "revision": part.revision(slot),
        "parts": {name: round(float(getattr(candidates, name)[place]), DIGITS) for name in names},
        "matched_example_index": matched if matched >= 0 else None,
    }
