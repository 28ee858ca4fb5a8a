"""What the router process holds and does: encoders, the index of each, and the thread that follows the change log.

Only that process imports this file. The encoder takes seconds to import, so it loads in a thread of its own;
until then BM25 answers alone, and every answer says so.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from numpy.typing import NDArray

from moerge import embedding
from moerge.errors import EncoderInvalid, MoergeError
from moerge.routing import cards, drafts
from moerge.routing.base import Query
from moerge.routing.partition import DEPTH
from moerge.routing.state import DEFAULT_STRATEGY, Hit, State
from registry import models
from registry.errors import IndexNotReady
from registry.models import RoutingClock
from registry.services import encoders
from registry.services.encoding_queue import EncodingQueue
from registry.services.following import Follower

if TYPE_CHECKING:
    from moerge.embedding.encoder import Encoder

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
WAIT_SECONDS = 2.0
# After how long an encoder that did not load is tried again.
RELOAD_SECONDS = 60.0
# Workers wait longer than web, because queries go first.
_CARD_SECONDS = 60.0


def load_encoder(row: models.Encoder) -> "Encoder":
    """The encoder of a row; importing its library is the slow part. Raises EncoderInvalid and OSError."""
    from moerge.embedding import encoder  # noqa: PLC0415  # torch and transformers: seconds, so only here and in a thread.

    if row.folder:
        return encoder.load(folder=Path(row.folder), encoder_id=row.pk, prefix=row.prefix, max_tokens=row.max_tokens)
    if row.pk != embedding.ENCODER_ID:
        raise EncoderInvalid(
            "the packaged encoder is not the one that the vectors are from",
            met=embedding.ENCODER_ID,
            wanted=row.pk,
            remedy=f"change to the packaged one: bin/manage change_encoder {embedding.ENCODER_ID}",
        )
    return encoder.load()


class Line:
    """One encoder, which loads in a thread of its own, and the index of its vectors."""

    def __init__(
        self, row: models.Encoder, *, load: Callable[[models.Encoder], "Encoder"], wake: Callable[[], None]
    ) -> None:
        self.row = row
        self.follower = Follower(row, wake=wake)
        self.encoder: Encoder | None = None
        self.trouble = ""
        self._load = load
        self._wake = wake
        self.load()

    def load(self) -> None:
        """Begin to load the encoder; again some time after that failed, for somebody may have put its folder right."""
        self.began_at = time.monotonic()
        self.loader = threading.Thread(target=self._load_encoder, daemon=True, name="encoder")
        self.loader.start()

    def encoder_state(self) -> str:
        return "ready" if self.encoder else "loading" if self.loader.is_alive() else "failed"

    def _load_encoder(self) -> None:
        started = time.monotonic()
        facts = {"encoder.id": self.row.pk}
        try:
            self.encoder = self._load(self.row)
        except (MoergeError, OSError) as error:
            self.trouble = str(error)
            log.exception("The encoder did not load.", extra=facts)
        else:
            self.trouble = ""
            seconds = round(time.monotonic() - started, 1)
            log.info("The encoder is ready.", extra={**facts, "encoder.load_seconds": seconds})
        self._wake()


@dataclass(frozen=True, kw_only=True, eq=False)
class Serving:
    """What answers a request: an index, and the encoder of its vectors, None while that loads."""

    line: Line
    state: State
    encoder: "Encoder | None"


class Router:
    """Answers from an immutable state that one thread replaces; requests never wait for the database."""

    def __init__(self, *, load: Callable[[models.Encoder], "Encoder"] = load_encoder) -> None:
        self._load = load
        # Replaced as a whole, by the follower's thread alone.
        self._lines: dict[str, Line] = {}
        self._active = ""
        self._serving: Serving | None = None
        self._queue = EncodingQueue(max_waiting_texts=settings.HUB_ROUTER_MAX_WAITING_TEXTS)
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True, name="index")

    @property
    def state(self) -> State | None:
        """The index that answers now; None until the first was built."""
        return self._serving.state if self._serving else None

    def start(self) -> Self:
        """Begin to load the encoder and to follow the change log."""
        self._follower.start()
        return self

    def stop(self) -> None:
        """End the follower, as when a test is over."""
        self._stopped.set()
        self._wake.set()
        self._follower.join()
        self._queue.close()

    def health(self) -> dict[str, Any]:
        """State of the encoder (ready, loading, failed) and of the index (ready, loading), and their figures."""
        serving, lines = self._serving, self._lines
        line = serving.line if serving else lines.get(self._active)
        if line is None:
            return {"encoder": "loading", "embedding_model": None, "index": "loading", "index_seq": None, "experts": 0}
        troubles = "; ".join(one.trouble for one in lines.values() if one.trouble)
        others = {name: one.encoder_state() for name, one in lines.items() if one is not line}
        return {
            "encoder": line.encoder_state(),
            "embedding_model": line.row.pk,
            **line.follower.figures(),
            **({"other_encoders": others} if others else {}),
            **({"trouble": troubles} if troubles else {}),
        }

    def encode(self, texts: Sequence[str], *, encoder_id: str) -> NDArray[np.float32]:
        """Unit vectors (n, d) of texts of cards by an encoder that is in use.

        Raises IndexNotReady while it loads, RouterBusy when too much waits, QueryInvalid for an empty text.
        """
        line = self._lines.get(encoder_id)
        if line is None or line.encoder is None:
            self._wake.set()
            trouble = f" {line.trouble}" if line and line.trouble else ""
            raise IndexNotReady(f"The encoder {encoder_id} is not loaded yet.{trouble}", retry_after_seconds=2)
        return self._queue.encode(line.encoder, texts, query=False, seconds=_CARD_SECONDS)

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
        vector: Sequence[float] | None = None,
        embedding_model: str | None = None,
    ) -> dict[str, Any]:
        """Rank experts for each text, whoever may see them: the caller checks that.

        With `vector`, which `embedding_model` made, that one query is asked by vector alone, whatever text is given.
        Raises IndexNotReady when the index does not reach `min_seq` within 2 s, RouterBusy when too many texts wait to
        be encoded, QueryInvalid for a bad strategy and for a vector of another width or length than the encoder's.
        """
        serving = self._reached(min_seq)
        state = serving.state
        wanted = strategy or DEFAULT_STRATEGY
        vectors: Iterable[NDArray[np.float32] | None] = [None] * len(texts)
        if vector is not None:
            if embedding_model != state.encoder_id:  # web knows which one is active
                raise IndexNotReady(f"The encoder {embedding_model} does not answer yet.", retry_after_seconds=1)
            wanted, vectors = "dense", [state.vector(vector, encoder_id=embedding_model)]
        elif serving.encoder is not None and wanted != "bm25":
            # What is left of web's patience is for the ranking and the way back.
            seconds = 0.8 * settings.HUB_ROUTER_TIMEOUT_SECONDS
            vectors = self._queue.encode(serving.encoder, texts, query=True, seconds=seconds)
        answers = []
        for text, own in zip(texts, vectors, strict=True):
            ranking = state.rank(
                Query(text=text, vector=own),
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
            "embedding_model": None if serving.encoder is None and vector is None else state.encoder_id,
            "strategy": wanted,
            "rankings": answers,
        }

    def preview(self, *, base_model: str, **texts: Any) -> dict[str, Any]:
        """Where a draft of a card would stand on a base for each of its examples, asked while it is not on the card.

        `texts` are the other fields of a Card. Raises IndexNotReady while the encoder loads, RouterBusy as in `route`.
        """
        serving = self._reached(0)
        if serving.encoder is None:
            raise IndexNotReady("The encoder is still loading.", retry_after_seconds=2)
        card = cards.Card(base_model=base_model, **{**texts, "examples": tuple(texts["examples"])})
        examples = cards.used_examples(card)
        seconds = 0.8 * settings.HUB_ROUTER_TIMEOUT_SECONDS
        # Somebody types and asks again and again; the vectors of queries are remembered, those of cards are not.
        has_prefix = bool(serving.line.row.prefix)
        vectors = self._queue.encode(serving.encoder, cards.texts(card), query=not has_prefix, seconds=seconds)
        asked = vectors[1 : 1 + len(examples)]
        if examples and has_prefix:
            asked = self._queue.encode(serving.encoder, examples, query=True, seconds=seconds)
        standings = [
            drafts.standing(serving.state, draft, Query(text=text, vector=vector))
            for draft, text, vector in zip(drafts.without_each_example(card, vectors), examples, asked, strict=True)
        ]
        return {"seq": serving.state.seq, "standings": [asdict(one) for one in standings]}

    def refresh(self) -> None:
        """Bring what answers up to the clock and the encoders in use, each with its own index."""
        # The clock first: every change up to it is there to be read.
        clock = RoutingClock.objects.order_by("pk").values_list("seq", flat=True).first() or 0
        active, preparing = encoders.in_use()
        self._active = active.pk
        line = self.line(active)
        if preparing is not None:
            # Not all of its vectors are there before it is active, so it follows nothing until then.
            self.line(preparing).follower.look()
        line.follower.follow(clock)
        serving = self._serving
        if serving is not None and serving.line is not line:
            # The one before answers until the active one can.
            serving.line.follower.follow(clock)
        self._settle()
        kept = {active.pk, preparing.pk if preparing else "", self._serving.line.row.pk if self._serving else ""}
        self._lines = {name: one for name, one in self._lines.items() if name in kept}

    def line(self, row: models.Encoder) -> Line:
        """The line of an encoder, which begins to load when it is first asked for."""
        known = self._lines.get(row.pk)
        if known is None:
            known = Line(row, load=self._load, wake=self._wake.set)
            self._lines = {**self._lines, row.pk: known}
        elif known.encoder_state() == "failed" and time.monotonic() - known.began_at > RELOAD_SECONDS:
            known.load()
        return known

    def _settle(self) -> None:
        """Put in place, by one assignment, what answers from now on: an index and the encoder of its own vectors."""
        before, line = self._serving, self._lines[self._active]
        if before is not None and before.line is not line and (line.encoder is None or line.follower.state is None):
            line = before.line
        state = line.follower.state
        if state is None:
            return
        with self._changed:
            self._serving = Serving(line=line, state=state, encoder=line.encoder)
            self._changed.notify_all()

    def _reached(self, seq: int) -> Serving:
        """What answers when its index is at `seq` or later; asks the follower to hurry and waits at most 2 s."""
        if not self._is_at(seq):
            self._wake.set()
            with self._changed:
                self._changed.wait_for(lambda: self._is_at(seq), timeout=WAIT_SECONDS)
        serving = self._serving
        if serving is None or serving.state.seq < seq:
            raise IndexNotReady(
                f"The routing index stands at {serving.state.seq if serving else 'nothing yet'}, wanted {seq}.",
                retry_after_seconds=1,
            )
        return serving

    def _is_at(self, seq: int) -> bool:
        return self._serving is not None and self._serving.state.seq >= seq

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
