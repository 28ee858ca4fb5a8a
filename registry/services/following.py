"""How a router keeps the index of one encoder up to the clock: a sound snapshot, and the changes after it on top.

Only the router process imports this file.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Q, QuerySet

from moerge.errors import IndexInvalid
from moerge.routing import snapshots
from moerge.routing.segment import Segment
from moerge.routing.state import State
from registry.models import Encoder, RoutingChange, RoutingSnapshot
from registry.services import entries

log = logging.getLogger(__name__)

# With more changes than these to come, a snapshot that is being opened is waited for.
REPLAY_COUNT = 1000


class Follower:
    """The state of one encoder's index. One thread calls `look` and `follow`; snapshots are opened in another.

    `wake` is called when a snapshot was opened or refused.
    """

    def __init__(self, encoder: Encoder, *, wake: Callable[[], None]) -> None:
        self.encoder = encoder
        self.state: State | None = None
        self._facts: dict[str, Any] = {
            "encoder_id": encoder.pk,
            "dimension": encoder.dimension,
            "thresholds": encoder.thresholds,
        }
        self._wake = wake
        self._snapshot: RoutingSnapshot | None = None
        self._refused: tuple[int, str] | None = None
        self._opening: threading.Thread | None = None
        self._opened: tuple[RoutingSnapshot, Mapping[str, Segment]] | None = None
        self._tried: set[tuple[int, str]] = set()
        self._is_absence_told = False

    def figures(self) -> dict[str, Any]:
        """How far the index is, how much of it is from a snapshot, and why a later snapshot is not in use."""
        state, refused = self.state, self._refused
        return {
            # A state without experts is false, and one all the same.
            "index": "loading" if state is None else "ready",
            "index_seq": None if state is None else state.seq,
            "experts": 0 if state is None else len(state),
            "snapshot_seq": self._snapshot.seq if self._snapshot else None,
            **({"snapshot_trouble": f"Snapshot {refused[0]} was passed by: {refused[1]}"} if refused else {}),
        }

    def look(self) -> None:
        """Begin to open the latest snapshot that is later than what there is, unless it was tried before."""
        if self._opening is not None and self._opening.is_alive():
            return
        rows = RoutingSnapshot.objects.filter(encoder=self.encoder.pk).order_by("-seq", "-pk")
        known = self._opened[0] if self._opened else self._snapshot
        if known is not None:
            # One that was built anew at the same number takes the place of the one that was not good.
            rows = rows.filter(Q(seq__gt=known.seq) | Q(seq=known.seq, pk__gt=known.pk))
        row = next((row for row in rows if (row.pk, row.digest) not in self._tried), None)
        if row is not None:
            self._tried.add((row.pk, row.digest))
            self._opening = threading.Thread(target=self._open, args=(row,), daemon=True, name="snapshot")
            self._opening.start()

    def follow(self, clock: int) -> None:
        """Bring the state up to the clock, which was read before, so that every change up to it is there to be read."""
        if self.state is not None and clock < self.state.seq:  # the database was set back to an older one
            self.state, self._snapshot, self._opened = None, None, None
            self._tried.clear()
            self._refused = None
        self.look()
        # Looked at in this order, a snapshot that is opened meanwhile is either met here or waited for.
        is_opening = self._opening is not None and self._opening.is_alive()
        opened, self._opened = self._opened, None
        state = State(**self._facts) if self.state is None else self.state
        if opened is not None and opened[0].seq <= clock:
            self._snapshot, segments = opened
            state = State.based_on(segments, seq=self._snapshot.seq, **self._facts)
        elif (self.state is not None and state.seq == clock) or (is_opening and _is_far(state.seq, clock)):
            return
        self.state = _replayed(state, clock, self.encoder)
        log.info("The routing index is at a new state.", extra={"index.seq": clock, "index.experts": len(self.state)})

    def _open(self, row: RoutingSnapshot) -> None:
        folder = Path(settings.HUB_HOME) / row.folder
        try:
            self._opened = row, snapshots.open(folder, row.digest, encoder_id=row.encoder).segments
            if self._refused is not None and self._refused[0] <= row.seq:
                self._refused = None
        except (IndexInvalid, OSError) as error:
            if self._refused is None or self._refused[0] <= row.seq:
                self._refused = row.seq, str(error)
            is_absent = not folder.is_dir()
            # A router that does not share the home meets this with every snapshot.
            if not (is_absent and self._is_absence_told):
                log.warning("A snapshot of the routing index was passed by.", extra={"error.detail": str(error)})
            self._is_absence_told = self._is_absence_told or is_absent
        self._wake()


def _changes(after: int, to: int) -> QuerySet[RoutingChange]:
    return RoutingChange.objects.filter(seq__gt=after, seq__lte=to).order_by("seq")


def _is_far(after: int, to: int) -> bool:
    return _changes(after, to).count() > REPLAY_COUNT


def _replayed(state: State, clock: int, encoder: Encoder) -> State:
    """The state after the changes between it and the clock; each is the last word on its expert."""
    changes = list(_changes(state.seq, clock))
    put = [change for change in changes if change.operation == RoutingChange.Operation.PUT]
    # Whoever has no fitting vectors is not left standing with the old ones.
    withdrawn = {change.expert_id for change in changes}
    return state.changed(seq=clock, put=entries.of(put, encoder), withdrawn=withdrawn)
