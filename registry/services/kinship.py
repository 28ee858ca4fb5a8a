"""How alike the experts of a recipe are: figures kept for each pair of contents, and a job for the missing ones."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from django.conf import settings
from django.db import transaction

from registry import jobs
from registry.jobs import JobKind
from registry.models import Job, Kinship, Revision, User
from registry.selectors import Viewer

REVISIONS, PAIRS = "revisions", "pairs"
OPEN = (Job.State.QUEUED, Job.State.RUNNING)
Pair = tuple[str, str]


@dataclass(frozen=True)
class Member:
    """One expert of a recipe: its name, the digest of its content, its revision, and how many values it changes."""

    expert: str
    digest: str
    revision: Revision
    values: int = 0


def between(members: Sequence[Member], *, viewer: Viewer) -> dict[str, Any]:
    """What is known of every pair, and the job that measures the rest when the viewer is signed in.

    `state` is `ready` when all is known, `measuring` while a job is at work, `failed` when that job failed, and
    `partial` with a `reason` where no job was made.
    """
    pairs = [(one, other, pair_of(one.digest, other.digest)) for one, other in combinations(members, 2)]
    known = figures(pair for _, _, pair in pairs)
    missing = sorted({pair for _, _, pair in pairs} - known.keys())
    return {
        **_state(members, missing, viewer=viewer),
        "pairs": [
            {"first": one.expert, "second": other.expert, **known[pair]} for one, other, pair in pairs if pair in known
        ],
    }


def figures(pairs: Iterable[Pair]) -> dict[Pair, dict[str, Any]]:
    """The figures of those pairs that were measured."""
    wanted = set(pairs)
    digests = {digest for pair in wanted for digest in pair}
    rows = Kinship.objects.filter(first__in=digests, second__in=digests)
    return {(row.first, row.second): row.figures for row in rows if (row.first, row.second) in wanted}


def record(found: Mapping[Pair, Mapping[str, float]]) -> None:
    """Keep the figures of pairs; what is there already stays, since the same contents have the same figures."""
    Kinship.objects.bulk_create(
        [Kinship(first=first, second=second, figures=dict(values)) for (first, second), values in found.items()],
        ignore_conflicts=True,
    )


def pair_of(digest: str, other: str) -> Pair:
    """The pair as it is kept: the order of two contents does not matter."""
    return (digest, other) if digest <= other else (other, digest)


def _state(members: Sequence[Member], missing: list[Pair], *, viewer: Viewer) -> dict[str, Any]:
    if not missing:
        return {"state": "ready", "job": None}
    if not isinstance(viewer, User):
        return _partial("Sign in to have the other pairs measured.")
    values, limit = sum(member.values for member in members), settings.HUB_KINSHIP_MAX_VALUES
    if values > limit:
        return _partial(f"The experts change {values} values together; at most {limit} are compared.")
    job = _job(members, missing, user=viewer)
    if job is None:
        return _partial("You have too many measurements waiting; ask again when one has ended.")
    return {"state": "measuring" if job.state in {*OPEN, Job.State.DONE} else job.state, "job": job.pk}


def _partial(reason: str) -> dict[str, Any]:
    return {"state": "partial", "job": None, "reason": reason}


def _job(members: Sequence[Member], missing: list[Pair], *, user: User) -> Job | None:
    """The one job for these pairs of these revisions; None when the user has too many waiting."""
    wanted = {digest for pair in missing for digest in pair}
    revisions = {member.digest: member.revision.pk for member in members if member.digest in wanted}
    named = f"{sorted(revisions.items())} {missing}"
    key = f"{JobKind.KINSHIP}:{hashlib.sha256(named.encode()).hexdigest()}"
    known = Job.objects.filter(key=key).first()
    if known is not None and known.state in {*OPEN, Job.State.FAILED}:
        return known
    waiting = Job.objects.filter(kind=JobKind.KINSHIP, requested_by=user, state__in=OPEN).count()
    if waiting >= settings.HUB_MERGE_MAX_QUEUED:
        return None
    if known is not None:
        # It was cancelled, or what it had found was removed since.
        jobs.repeat(known)
        known.refresh_from_db()
        return known
    with transaction.atomic():
        return jobs.enqueue(
            JobKind.KINSHIP,
            key=key,
            parameters={REVISIONS: revisions, PAIRS: [list(pair) for pair in missing]},
            user=user,
            priority=jobs.NOBODY_WAITS,
        )
