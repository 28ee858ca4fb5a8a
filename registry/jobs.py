"""Background work: asked for, claimed, kept alive, finished and swept, all through the Job row.

The row is written in the transaction that needs the work and sent on commit; the message carries only the row's id.
A worker claims the row with SKIP LOCKED and holds a lease; every later write carries its token, so that a worker that
was thought dead cannot overwrite. A lost message is found by the sweeper.
"""

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import partial
from typing import Any

from celery import current_app
from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from kombu.exceptions import OperationalError

from registry.errors import HubError, Unavailable
from registry.models import Job, Merge, Revision, User

log = logging.getLogger(__name__)


class JobKind(StrEnum):
    """Every kind of background work; workers/jobs has a file for each. Values are stable data."""

    CHECK = "check"
    COMPRESS = "compress"
    EMBED = "embed"
    INDEX = "index"
    MERGE = "merge"
    KINSHIP = "kinship"
    RECONSTRUCT = "reconstruct"
    REEMBED = "reembed"
    SNAPSHOT = "snapshot"
    PROTOTYPES = "prototypes"
    NEIGHBOURS = "neighbours"
    DESCRIBE = "describe"


HEAVY = frozenset({
    JobKind.COMPRESS, JobKind.MERGE, JobKind.KINSHIP, JobKind.RECONSTRUCT, JobKind.SNAPSHOT, JobKind.PROTOTYPES,
    JobKind.NEIGHBOURS, JobKind.DESCRIBE,
})  # fmt: skip
# Job.priority; the queues give the smallest number first.
WAITED_FOR, ASKED_FOR, NOBODY_WAITS = 0, 3, 6
# A worker that no longer hears its own clock is ended by Celery, long after its job was closed.
KILL_AFTER_SECONDS = 120
PIPELINE = (JobKind.CHECK, JobKind.COMPRESS, JobKind.EMBED, JobKind.INDEX)


@dataclass(frozen=True)
class Lease:
    """A claimed job: who holds it and on what."""

    job_id: str
    kind: str
    owner: str
    revision_id: int | None
    merge_id: str | None
    parameters: dict[str, Any]


def enqueue(
    kind: JobKind,
    *,
    revision: Revision | None = None,
    merge: Merge | None = None,
    after: Job | None = None,
    key: str = "",
    parameters: dict[str, Any] | None = None,
    user: User | None = None,
    priority: int | None = None,
) -> Job:
    """Write a job in the caller's transaction and send it on commit; the same key is the same job.

    Without a priority it is that of work which the user asked for, or of work that nobody waits for.
    """
    subject = f"r{revision.pk}" if revision else f"m{merge.pk}" if merge else "hub"
    job, is_new = Job.objects.get_or_create(
        key=key or f"{kind}:{subject}",
        defaults={
            "kind": str(kind),
            "revision": revision,
            "merge": merge,
            "after": after,
            "parameters": parameters or {},
            "requested_by": user,
            "priority": (ASKED_FOR if user else NOBODY_WAITS) if priority is None else priority,
        },
    )
    if is_new and after is None:
        transaction.on_commit(partial(send, job.pk, job.kind, job.priority))
    return job


def enqueue_pipeline(
    revision: Revision, *, user: User | None = None, compression: dict[str, Any] | None = None
) -> list[Job]:
    """check → compress → embed → index for one revision; each starts when the one before has passed.

    `compression` holds what was chosen for the compressed form; where it is silent the base model's size decides.
    """
    jobs: list[Job] = []
    for kind in PIPELINE:
        parameters = compression if kind == JobKind.COMPRESS else None
        after = jobs[-1] if jobs else None
        jobs.append(enqueue(kind, revision=revision, after=after, parameters=parameters, user=user))
    return jobs


def enqueue_fingerprint(revision: Revision) -> Job:
    """Prototypes and a fingerprint of a revision's weights, then its neighbours, beside the pipeline, which never waits
    for them. Gives the first of the two jobs; call it in a transaction.
    """
    first = enqueue(JobKind.PROTOTYPES, revision=revision)
    if revision.derived_from_id is None:
        enqueue(JobKind.NEIGHBOURS, revision=revision, after=first)
    return first


def of_pipeline(revision_id: int) -> QuerySet[Job]:
    """The jobs that make a revision ready; what else is made of it later is not among them."""
    return Job.objects.filter(revision_id=revision_id, key__in=_pipeline_keys(revision_id))


def _pipeline_keys(revision_id: int) -> list[str]:
    """The keys that `enqueue` gives when none is named."""
    return [f"{kind}:r{revision_id}" for kind in PIPELINE]


def send(job_id: str, kind: str, priority: int, *, delay_seconds: int = 0) -> None:
    """Hand a job's id to the queue. A broker that is down is logged; the sweeper sends the row later."""
    queue = "heavy" if kind in HEAVY else "light"
    limit_seconds = settings.HUB_MERGE_MAX_SECONDS + KILL_AFTER_SECONDS if kind == JobKind.MERGE else None
    try:
        current_app.signature(f"workers.{kind}", args=[job_id], queue=queue).apply_async(
            countdown=delay_seconds, priority=priority, time_limit=limit_seconds
        )
    except (OperationalError, OSError) as error:
        log.warning(
            "The queue did not take a job; the sweeper will send it.", extra={"job.id": job_id, "error": str(error)}
        )
        return
    Job.objects.filter(pk=job_id).update(sent_at=timezone.now())


def claim(job_id: str) -> Lease | None:
    """Take a job that nobody holds and whose predecessor has passed; None when it is not to be had."""
    now = timezone.now()
    with transaction.atomic():
        row = (
            Job.objects.select_for_update(skip_locked=True, of=("self",))
            .filter(pk=job_id)
            .filter(Q(after=None) | Q(after__state__in=Job.PASSED))
            .filter(Q(state=Job.State.QUEUED) | Q(state=Job.State.RUNNING, lease_until__lt=now))
            .first()
        )
        if row is None:
            return None
        if row.attempt >= settings.HUB_JOB_MAX_ATTEMPTS:
            _close(row, Job.State.FAILED, error=_worn_out(row))
            return None
        if row.state == Job.State.QUEUED:
            if _must_wait(row):
                return None
            row.message = ""  # why it waited
        row.state = Job.State.RUNNING
        row.owner = secrets.token_hex(16)
        row.attempt += 1
        row.lease_until = now + timedelta(seconds=settings.HUB_JOB_LEASE_SECONDS)
        row.started_at = row.started_at or now
        row.save(update_fields=["state", "owner", "attempt", "lease_until", "started_at", "message"])
        if row.merge_id and row.kind == JobKind.MERGE:
            # A job whose worker died after it had published its result finds that result.
            merge = Merge.objects.filter(pk=row.merge_id).exclude(state=Merge.State.READY)
            merge.update(state=Merge.State.RUNNING)
    return Lease(row.pk, row.kind, row.owner, row.revision_id, row.merge_id, row.parameters)


def _must_wait(row: Job) -> bool:
    """Whether as many merges of this user run as may at a time; then the end of one of them sends the next.

    The user's row is locked, so that two workers do not take the last free place both.
    """
    if row.kind != JobKind.MERGE or row.requested_by_id is None:
        return False
    User.objects.select_for_update(no_key=True).get(pk=row.requested_by_id)
    running = Job.objects.filter(kind=JobKind.MERGE, requested_by=row.requested_by_id, state=Job.State.RUNNING).count()
    if running < settings.HUB_MERGE_MAX_RUNNING:
        return False
    Job.objects.filter(pk=row.pk).update(message=f"Waits until one of {running} running merges of this user has ended.")
    return True


def _send_next_merge(user_id: int) -> None:
    """Send the most urgent merge of a user that waits; its message may have come while the user's places were taken."""
    waiting = Job.objects.filter(kind=JobKind.MERGE, requested_by=user_id, state=Job.State.QUEUED)
    row = waiting.order_by("priority", "created_at").first()
    if row is not None:
        send(row.pk, row.kind, row.priority)


def is_wanted(lease: Lease) -> bool:
    """Whether nobody has asked to stop and no other worker has the job; a row that cannot be seen says neither."""
    row = Job.objects.filter(pk=lease.job_id)
    return not row.exclude(owner=lease.owner, state=Job.State.RUNNING, cancel_requested=False).exists()


def heartbeat(lease: Lease, *, progress: float | None = None, message: str | None = None) -> bool:
    """Extend the lease and tell progress; False when the lease is lost or a cancel was asked for: stop then."""
    changes: dict[str, Any] = {"lease_until": timezone.now() + timedelta(seconds=settings.HUB_JOB_LEASE_SECONDS)}
    if progress is not None:
        changes["progress"] = min(1.0, max(0.0, progress))
    if message is not None:
        changes["message"] = message[:300]
    return bool(held(lease).filter(cancel_requested=False).update(**changes) == 1)


def held(lease: Lease) -> QuerySet[Job]:
    """The rows (one or none) that this lease may still write."""
    return Job.objects.filter(pk=lease.job_id, owner=lease.owner, state=Job.State.RUNNING)


def finish(
    lease: Lease, *, state: str = Job.State.DONE, result: dict[str, Any] | None = None, message: str = ""
) -> bool:
    """Close a job that passed and start what waited for it; False when the lease was lost."""
    with transaction.atomic():
        row = held(lease).select_for_update(of=("self",)).first()
        if row is None:
            return False
        _close(row, state, result=result, message=message)
    return True


def fail(lease: Lease, error: dict[str, Any]) -> bool:
    """Close a job that cannot succeed, and all that waits for it."""
    with transaction.atomic():
        row = held(lease).select_for_update(of=("self",)).first()
        if row is None:
            return False
        _close(row, Job.State.FAILED, error=error)
    return True


def postpone(lease: Lease, *, seconds: int, reason: str) -> None:
    """Give a job back for a later try because something it needs is away; this does not count as an attempt.

    A job that has waited HUB_JOB_MAX_SECONDS in all fails with the last reason.
    """
    with transaction.atomic():
        row = held(lease).select_for_update(of=("self",)).first()
        if row is None:
            return
        if timezone.now() - row.created_at > timedelta(seconds=settings.HUB_JOB_MAX_SECONDS):
            _close(row, Job.State.FAILED, error=Unavailable(reason).as_dict())
            return
        row.state, row.owner, row.lease_until, row.message = Job.State.QUEUED, "", None, reason[:300]
        row.attempt -= 1
        row.save(update_fields=["state", "owner", "lease_until", "message", "attempt"])
        transaction.on_commit(partial(send, row.pk, row.kind, row.priority, delay_seconds=seconds))


def cancel(job: Job) -> None:
    """Ask a job to stop; one that nobody holds stops at once."""
    with transaction.atomic():
        row = Job.objects.select_for_update().get(pk=job.pk)
        if row.state == Job.State.QUEUED:
            _close(row, Job.State.CANCELLED, message="Cancelled before it started.")
        elif row.state == Job.State.RUNNING:
            row.cancel_requested = True
            row.save(update_fields=["cancel_requested"])


def retry(jobs: Iterable[Job]) -> None:
    """Open failed or cancelled jobs again, as after an outage."""
    with transaction.atomic():
        for job in jobs:
            if job.merge_id and job.kind == JobKind.MERGE:
                ended = Merge.objects.filter(pk=job.merge_id, state__in=[Merge.State.FAILED, Merge.State.CANCELLED])
                ended.update(state=Merge.State.QUEUED)
            _reopen(job, (Job.State.FAILED, Job.State.CANCELLED))
            if job.revision_id and job.key in _pipeline_keys(job.revision_id):
                Revision.objects.filter(pk=job.revision_id).update(state=Revision.State.PROCESSING)
            if job.after_id is None or Job.objects.filter(pk=job.after_id, state__in=Job.PASSED).exists():
                transaction.on_commit(partial(send, job.pk, job.kind, job.priority))


def repeat(job: Job) -> None:
    """Have a job outside the pipeline done again: it was cancelled, or what it had made was removed since."""
    with transaction.atomic():
        if _reopen(job, (Job.State.DONE, Job.State.CANCELLED)):
            transaction.on_commit(partial(send, job.pk, job.kind, job.priority))


def renew(job: Job, *, user: User | None, priority: int) -> None:
    """Have a job that ended, however it did, done again for this user. The caller holds the lock of its subject."""
    if _reopen(job, Job.FINISHED):
        Job.objects.filter(pk=job.pk).update(requested_by=user, priority=priority)
        transaction.on_commit(partial(send, job.pk, job.kind, priority))


def hasten(job: Job) -> None:
    """Put a job that waits in the queue before all for which nobody waits."""
    if Job.objects.filter(pk=job.pk, state=Job.State.QUEUED, priority__gt=WAITED_FOR).update(priority=WAITED_FOR):
        # Its first message stays in the queue; whoever takes that one finds that the job is not to be had.
        transaction.on_commit(partial(send, job.pk, job.kind, WAITED_FOR))


def _reopen(job: Job, states: Iterable[str]) -> bool:
    """Put a job that ended in one of these states back into the queue; False when it is in none of them."""
    opened = Job.objects.filter(pk=job.pk, state__in=list(states)).update(
        state=Job.State.QUEUED,
        attempt=0,
        error=None,
        result=None,
        owner="",
        lease_until=None,
        cancel_requested=False,
        created_at=timezone.now(),
        sent_at=None,
        started_at=None,
        finished_at=None,
        progress=0.0,
        message="",
    )
    return opened == 1


def sweep() -> int:
    """Send again what nobody took in time and what a dead worker held; returns how many were sent."""
    now = timezone.now()
    waited = now - timedelta(seconds=settings.HUB_JOB_SWEEP_SECONDS)
    startable = Q(after=None) | Q(after__state__in=Job.PASSED)
    lost = Q(state=Job.State.QUEUED, created_at__lt=waited) & (Q(sent_at=None) | Q(sent_at__lt=waited))
    dead = Q(state=Job.State.RUNNING, lease_until__lt=now)
    rows = Job.objects.filter(startable & (lost | dead)).values_list("pk", "kind", "priority")[:1000]
    for job_id, kind, priority in rows:
        send(job_id, kind, priority)
    return len(rows)


def _worn_out(row: Job) -> dict[str, Any]:
    return HubError(
        f"The job was tried {row.attempt} times and its worker died each time. Last word: {row.message or 'none'}"
    ).as_dict()


def _close(
    row: Job,
    state: str,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    message: str = "",
) -> None:
    """Write the end of a job inside the caller's transaction, then wake or cancel what waits for it."""
    if row.state == Job.State.RUNNING and row.kind == JobKind.MERGE and row.requested_by_id is not None:
        # After the commit, so that a merge which found the places taken until then is seen.
        transaction.on_commit(partial(_send_next_merge, row.requested_by_id))
    row.state, row.result, row.error, row.message = state, result, error, message[:300]
    row.finished_at, row.lease_until, row.owner = timezone.now(), None, ""
    if state in Job.PASSED:
        row.progress = 1.0
    row.save()
    if state in Job.PASSED:
        for waiting in row.next_jobs.filter(state=Job.State.QUEUED):
            transaction.on_commit(partial(send, waiting.pk, waiting.kind, waiting.priority))
    else:
        for waiting in row.next_jobs.filter(state=Job.State.QUEUED):
            _close(waiting, Job.State.CANCELLED, message=f"Not started: {row.kind} did not pass.")
    _settle_subject(row)


def _settle_subject(row: Job) -> None:
    """Bring the state of the revision or merge in line with its jobs."""
    if row.merge_id and row.kind == JobKind.MERGE and row.state in {Job.State.FAILED, Job.State.CANCELLED}:
        state = Merge.State.FAILED if row.state == Job.State.FAILED else Merge.State.CANCELLED
        Merge.objects.filter(pk=row.merge_id).exclude(state=Merge.State.READY).update(
            state=state, finished_at=row.finished_at
        )
    if row.revision_id is None or row.key not in _pipeline_keys(row.revision_id):
        return
    states = set(of_pipeline(row.revision_id).values_list("state", flat=True))
    revision = Revision.objects.filter(pk=row.revision_id).exclude(state=Revision.State.INCOMPLETE)
    if Job.State.FAILED in states:
        revision.update(state=Revision.State.FAILED)
    elif states <= set(Job.PASSED):
        revision.update(state=Revision.State.READY)
