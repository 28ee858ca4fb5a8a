"""Snapshots of the routing index: when one is wanted, how it is built, and which are kept.

They save a router from replaying the whole log. The files can be made again at any time from the database.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import connection, transaction
from django.db.models.fields.json import KT
from django.db.models.functions import Collate
from django.utils import timezone

from moerge.errors import IndexInvalid
from registry import jobs
from registry.errors import IndexNotReady
from registry.jobs import JobKind
from registry.models import Encoder, Job, RoutingChange, RoutingClock, RoutingSnapshot
from registry.services import encoders, entries

if TYPE_CHECKING:
    from moerge.routing.segment import Segment

log = logging.getLogger(__name__)

FOLDER = "index"
KEPT_COUNT = 2
# An overlay is searched without an index of its own, so it stays this share of the snapshot.
OVERLAY_SHARE = 0.05
RETRY = timedelta(minutes=10)

# The number that builders lock in PostgreSQL, where only this hub has its tables.
_LOCK = 7_310_274_518


def ask(*, is_due: bool = False) -> Job | None:
    """Have a snapshot built when too many changes are not in the last one, or, once a day, when it `is_due`."""
    encoder = encoders.active()
    last = RoutingSnapshot.objects.filter(encoder=encoder.pk).order_by("-seq").first()
    experts = last.counts["experts"] if last else 0
    pending = RoutingChange.objects.filter(seq__gt=last.seq if last else 0).count()
    is_wanted = pending > max(settings.HUB_OVERLAY_MAX_EXPERTS, OVERLAY_SHARE * experts)
    if not is_wanted and not (is_due and (pending or last)):
        return None
    job = jobs.enqueue(
        JobKind.SNAPSHOT, key=f"{JobKind.SNAPSHOT}:{encoders.slug(encoder.pk)}", parameters={"encoder": encoder.pk}
    )
    if job.state == Job.State.FAILED and job.finished_at and job.finished_at > timezone.now() - RETRY:
        return None
    jobs.renew(job, user=None, priority=jobs.NOBODY_WAITS)
    return job


def build(encoder: Encoder) -> RoutingSnapshot:
    """A snapshot by this encoder of all that was published until now; the last one when nothing came since.

    Killed at any moment, it leaves what was there before, and files that the next one removes.
    Raises IndexNotReady while another process builds one.
    """
    from moerge.routing import snapshots  # noqa: PLC0415  # faiss is for builders and routers alone.

    with _alone():
        _remove_leftovers()
        with transaction.atomic(durable=True), connection.cursor() as cursor:
            # Clock, changes and vectors as of one moment.
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            seq = RoutingClock.objects.values_list("seq", flat=True).first() or 0
            last = RoutingSnapshot.objects.filter(encoder=encoder.pk, seq=seq).first()
            if last is not None and _is_sound(last):
                return last
            segments, read_count = _segments(encoder)
        if last is not None:
            forget(last)
        folder = f"{FOLDER}/{encoders.slug(encoder.pk)}/{seq}"
        path = Path(settings.HUB_HOME) / folder
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = snapshots.write(path, segments, seq=seq, encoder_id=encoder.pk, dimension=encoder.dimension)
        experts = sum(len(segment) for segment in segments.values())
        counts = {
            "bases": len(segments),
            "experts": experts,
            "left_out": read_count - experts,
            "vectors": sum(len(segment.vectors) for segment in segments.values()),
            "bytes": sum(file.stat().st_size for file in path.iterdir()),
        }
        row = RoutingSnapshot.objects.create(encoder=encoder.pk, seq=seq, folder=folder, digest=digest, counts=counts)
        # A reader begins with the latest, and two that are later are there before one goes.
        for old in RoutingSnapshot.objects.filter(encoder=encoder.pk).order_by("-seq")[KEPT_COUNT:]:
            forget(old)
    log.info("A snapshot of the routing index was built.", extra={"index.seq": seq, "index.experts": experts})
    return row


def forget(row: RoutingSnapshot) -> None:
    """Remove a snapshot. Readers that have it mapped go on with it."""
    # In this order, nobody is sent to a folder that is not there.
    row.delete()
    shutil.rmtree(Path(settings.HUB_HOME) / row.folder, ignore_errors=True)  # The next build tries again.


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other builders out; PostgreSQL lets go of the lock when this process dies."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [_LOCK])
        if not cursor.fetchone()[0]:
            raise IndexNotReady("Another snapshot is being built.", retry_after_seconds=5)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [_LOCK])


def _segments(encoder: Encoder) -> tuple[dict[str, "Segment"], int]:
    """All published experts by base model, and of how many changes: who lacks vectors is not among the experts."""
    from moerge.routing.segment import Segment  # noqa: PLC0415  # faiss is for builders and routers alone.

    base, expert = Collate(KT("card__base_model"), "C"), Collate(KT("card__expert"), "C")
    puts = RoutingChange.objects.filter(operation=RoutingChange.Operation.PUT).order_by(base, expert, "-seq")
    segments, read_count = {}, 0

    def counted(changes: Iterable[RoutingChange]) -> Iterator[RoutingChange]:
        nonlocal read_count
        for change in changes:
            read_count += 1
            yield change

    changes = _first_of_each(puts.iterator(chunk_size=entries.AT_ONCE))
    for name, own in itertools.groupby(changes, key=lambda change: str(change.card["base_model"])):
        segments[name] = Segment.build(entries.of(counted(own), encoder), dimension=encoder.dimension)
    return segments, read_count


def _first_of_each(changes: Iterable[RoutingChange]) -> Iterator[RoutingChange]:
    """One change for each name: it belongs to who took it last."""
    before = None
    for change in changes:
        if change.card["expert"] != before:
            yield change
        before = change.card["expert"]


def _is_sound(row: RoutingSnapshot) -> bool:
    from moerge.routing import snapshots  # noqa: PLC0415  # faiss is for builders and routers alone.

    try:
        snapshots.open(Path(settings.HUB_HOME) / row.folder, row.digest, encoder_id=row.encoder)
    except (IndexInvalid, OSError) as error:
        log.warning("A snapshot of the routing index is damaged.", extra={"error.detail": str(error)})
        return False
    return True


def _remove_leftovers() -> None:
    """Remove the folders that no row names: of builds that were killed, and of rows that are gone."""
    root = Path(settings.HUB_HOME) / FOLDER
    known = set(RoutingSnapshot.objects.values_list("folder", flat=True))
    for path in root.glob("*/*"):
        if path.relative_to(settings.HUB_HOME).as_posix() not in known:
            shutil.rmtree(path)
