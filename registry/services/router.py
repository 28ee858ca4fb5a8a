"""What the router process holds and does: the encoder, the index, and the thread that follows the change log.

Only that process imports this file. The encoder takes 10 s and more to import, so it loads in a thread of its own;
until then BM25 answers alone, and every answer says so.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from django.db import DatabaseError, InterfaceError, connection
from numpy.typing import NDArray

from moerge import embedding
from moerge.errors import IndexInvalid, MoergeError
from moerge.routing import cards
from moerge.routing.base import Query
from moerge.routing.partition import DEPTH
from moerge.routing.state import DEFAULT_STRATEGY, Hit, State
from registry.errors import IndexNotReady
from registry.models import Embedding, RoutingChange, RoutingClock

if TYPE_CHECKING:
    from moerge.embedding.encoder import Encoder

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
WAIT_SECONDS = 2.0
_ROWS_AT_ONCE = 500

# In the order of the rows of an entry.
_ROW_KINDS = ("description", "centroid", "example", "instruction")


def load_encoder() -> "Encoder":
    """The packaged encoder; importing it is the slow part."""
    from moerge.embedding import encoder  # noqa: PLC0415  # Measured: 10 to 25 s, so only here and in a thread.

    return encoder.load()


class Router:
    """Answers from an immutable state that one thread replaces; requests never wait for the database."""

    def __init__(self, *, load: Callable[[], "Encoder"] = load_encoder) -> None:
        self._load = load
        self._encoder: Encoder | None = None
        self._state: State | None = None
        # Under which id an expert's entry stands in the state, and whose entry stands under an id.
        self._ids: dict[int, str] = {}
        self._owners: dict[str, int] = {}
        self._reason = ""
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._loader = threading.Thread(target=self._load_encoder, daemon=True, name="encoder")
        self._follower = threading.Thread(target=self._follow, daemon=True, name="index")

    def start(self) -> Self:
        """Begin to load the encoder and to follow the change log."""
        self._loader.start()
        self._follower.start()
        return self

    def stop(self) -> None:
        """End the follower, as when a test is over."""
        self._stopped.set()
        self._wake.set()
        self._follower.join()

    def health(self) -> dict[str, Any]:
        """State of the encoder (ready, loading, failed) and of the index (ready, loading), and their figures."""
        state = self._state
        encoder = "ready" if self._encoder else "loading" if self._loader.is_alive() else "failed"
        return {
            "encoder": encoder,
            "embedding_model": embedding.ENCODER_ID,
            "index": "ready" if state else "loading",
            "index_seq": state.seq if state else None,
            "experts": len(state) if state else 0,
            **({"trouble": self._reason} if self._reason else {}),
        }

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (n, 384). Raises IndexNotReady while the encoder loads, QueryInvalid for an empty text."""
        if self._encoder is None:
            raise IndexNotReady("The encoder is still loading.", retry_after_seconds=2)
        return self._encoder.encode(texts)

    def route(
        self,
        *,
        texts: Sequence[str],
        base_model: str | None = None,
        strategy: str | None = None,
        limit: int = 10,
        allow: Sequence[int] | None = None,
        min_seq: int = 0,
        explain: bool = False,
    ) -> dict[str, Any]:
        """Rank experts for each text, whoever may see them: the caller checks that.

        Raises IndexNotReady when the index does not reach `min_seq` within 2 s, QueryInvalid for a bad strategy.
        """
        state = self._reached(min_seq)
        wanted = strategy or DEFAULT_STRATEGY
        vectors: Iterable[NDArray[np.float32] | None] = [None] * len(texts)
        if self._encoder is not None and wanted != "bm25":
            vectors = self._encoder.encode(texts)
        answers = []
        for text, vector in zip(texts, vectors, strict=True):
            ranking = state.rank(
                Query(text=text, vector=vector),
                base_model=base_model,
                strategy=wanted,
                depth=max(DEPTH, limit),
                limit=limit,
                allow=allow,
            )
            answers.append(
                {
                    "strategy": ranking.strategy.name,
                    "min_score": ranking.min_score,
                    "exhausted": ranking.exhausted,
                    "hits": [_hit(state, hit, explain=explain) for hit in ranking.hits],
                }
            )
        return {
            "seq": state.seq,
            "embedding_model": None if self._encoder is None else self._encoder.id,
            "strategy": wanted,
            "rankings": answers,
        }

    def refresh(self) -> None:
        """Bring the state up to the clock. The clock is read first, so every change up to it is there to be read."""
        clock = RoutingClock.objects.order_by("pk").values_list("seq", flat=True).first() or 0
        state = self._state
        if state is None or clock < state.seq:  # at the start, or the database was set back to an older one
            state = State(encoder_id=embedding.ENCODER_ID, dimension=embedding.DIMENSION)
            self._ids, self._owners = {}, {}
        elif clock == state.seq:
            return
        state = self._applied(state, clock)
        with self._changed:
            self._state = state
            self._changed.notify_all()
        log.info("The routing index is at a new state.", extra={"index.seq": state.seq, "index.experts": len(state)})

    def _applied(self, state: State, clock: int) -> State:
        """The state after the changes between it and the clock, in order; the last word on an expert counts."""
        found = RoutingChange.objects.filter(seq__gt=state.seq, seq__lte=clock).order_by("seq")
        changes = {change.expert_id: change for change in found}
        entries = dict(_entries([change for change in changes.values() if change.operation == "put"]))
        put: dict[str, cards.Entry] = {}
        removed: set[str] = set()
        for change in sorted(changes.values(), key=lambda change: change.seq):
            if (before := self._ids.pop(change.expert_id, None)) is not None:
                del self._owners[before]
                removed.add(before)
            entry = entries.get(change.seq)
            if entry is not None:
                expert = entry.card.expert
                # A name that went from one expert to another belongs to the later one alone.
                if (other := self._owners.get(expert)) is not None:
                    del self._ids[other]
                self._ids[change.expert_id], self._owners[expert] = expert, change.expert_id
                put[expert] = entry
        return state.changed(seq=clock, put=put.values(), removed=removed)

    def _reached(self, seq: int) -> State:
        """The state at `seq` or later; asks the follower to hurry and waits at most 2 s."""
        if self._state is None or self._state.seq < seq:
            self._wake.set()
            with self._changed:
                self._changed.wait_for(lambda: self._state is not None and self._state.seq >= seq, timeout=WAIT_SECONDS)
        state = self._state
        if state is None or state.seq < seq:
            raise IndexNotReady(
                f"The routing index stands at {state.seq if state else 'nothing yet'}, wanted {seq}.",
                retry_after_seconds=1,
            )
        return state

    def _load_encoder(self) -> None:
        started = time.monotonic()
        try:
            self._encoder = self._load()
        except (MoergeError, OSError) as error:
            self._reason = str(error)
            log.exception("The encoder did not load; BM25 answers alone.")
            return
        log.info("The encoder is ready.", extra={"encoder.load_seconds": round(time.monotonic() - started, 1)})

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                self.refresh()
            except (DatabaseError, InterfaceError) as error:
                log.warning("The database did not tell the changes.", extra={"error.detail": str(error)})
                connection.close()
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
        connection.close()


def _entries(changes: Sequence[RoutingChange]) -> Iterator[tuple[int, cards.Entry]]:
    """Number of the change and entry, for each change whose vectors are stored by this encoder."""
    for start in range(0, len(changes), _ROWS_AT_ONCE):
        some = changes[start : start + _ROWS_AT_ONCE]
        rows: dict[int, dict[str, list[bytes]]] = {}
        stored = Embedding.objects.filter(
            revision_id__in=[change.revision_id for change in some], encoder=embedding.ENCODER_ID
        ).order_by("position")
        for revision_id, kind, vector in stored.values_list("revision_id", "kind", "vector"):
            rows.setdefault(revision_id, {}).setdefault(kind, []).append(bytes(vector))
        for change in some:
            own = rows.get(change.revision_id or 0, {})
            ordered = [vector for kind in _ROW_KINDS for vector in own.get(kind, ())]
            try:
                yield change.seq, cards.restored(_card(change), _matrix(ordered))
            except IndexInvalid as error:
                # Its embed job will store them and publish again; nobody else waits for that.
                log.warning("An expert has no fitting vectors.", extra={"error.detail": str(error)})


def _card(change: RoutingChange) -> cards.Card:
    known = change.card
    return cards.Card(
        expert=known["expert"],
        base_model=known["base_model"],
        name=known["name"],
        description=known["description"],
        examples=tuple(known["examples"]),
        # A change of an older version has neither.
        tags=tuple(known.get("tags", ())),
        instruction=known.get("instruction", ""),
        number=change.expert_id,
        revision=change.revision_id or 0,
    )


def _matrix(rows: Sequence[bytes]) -> NDArray[np.float16]:
    if any(len(row) != 2 * embedding.DIMENSION for row in rows):
        raise IndexInvalid("a stored vector has another width than the encoder's", wanted=embedding.DIMENSION)
    return np.frombuffer(b"".join(rows), dtype="<f2").reshape(len(rows), embedding.DIMENSION)


def _hit(state: State, hit: Hit, *, explain: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "revision": hit.revision,
        "score": hit.score,
        "confidence": hit.confidence,
        "parts": dict(hit.parts),
        "matched_example_index": hit.matched_example_index,
    }
    if explain and hit.matched_example_index is not None:
        card = state.partitions[hit.base_model].card(hit.expert)
        record["matched_example"] = cards.used_examples(card)[hit.matched_example_index]
    return record
