"""Fingerprints: what the weights of a revision tell by themselves, kept beside it and made again at will."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.db import transaction
from django.db.models import Q
from numpy.typing import NDArray

from registry import jobs
from registry.jobs import JobKind
from registry.models import Expert, Fingerprint, Job, Revision
from registry.services import blobs
from registry.services.blobs import Staged

# Raise it when the same weights come to other prototypes or another sketch; older rows are then made again.
VERSION = 1


@dataclass(frozen=True, eq=False)
class Sketch:
    """A revision of some expert, and the sketch of its weights."""

    revision_id: int
    expert_id: int
    is_public: bool
    sketch: NDArray[np.float32]


def record(
    *, revision: Revision, source: str, sketch: NDArray[np.float32], staged: Staged | None, facts: dict[str, Any]
) -> Fingerprint:
    """Keep what was found in the weights with the SHA-256 `source`; a second run replaces it by the same.

    `staged` holds the prototypes and is consumed; None where there are none. A sketch of zeros is kept as nothing.
    """
    blob = blobs.keep(staged) if staged else None
    with transaction.atomic():
        Revision.objects.select_for_update(of=("self",)).get(pk=revision.pk)
        if blob is not None:
            blobs.touch([blob.pk])
        written = {
            "source": source,
            "blob": blob,
            "sketch": sketch.astype("<f2").tobytes() if sketch.any() else b"",
            "facts": {**facts, "version": VERSION},
        }
        row, _ = Fingerprint.objects.update_or_create(revision=revision, defaults=written)
    return row


def obtain(revision: Revision) -> Fingerprint | Job:
    """The fingerprint of a revision, or the job that makes it, started where nobody had: for revisions that are older
    than fingerprints, or whose job was lost.
    """
    row = Fingerprint.objects.filter(revision=revision).select_related("blob").first()
    return row or _ask(revision, priority=jobs.WAITED_FOR)


def ask_for_missing() -> Iterator[Revision]:
    """Start the jobs of every head that has no fingerprint, or one of an older version; gives each revision."""
    heads = Revision.objects.filter(refs__isnull=False, expert__deleted_at=None, derived_from=None)
    missing = heads.exclude(state=Revision.State.INCOMPLETE).exclude(fingerprint__facts__version=VERSION)
    for revision in missing.distinct().order_by("pk"):
        _ask(revision, priority=jobs.NOBODY_WAITS)
        yield revision


def _ask(revision: Revision, *, priority: int) -> Job:
    """The jobs of a revision, opened again where they had ended without a result."""
    with transaction.atomic():
        job = jobs.enqueue_fingerprint(revision)
        job.refresh_from_db()
        if job.state in {Job.State.DONE, Job.State.CANCELLED}:
            jobs.repeat(job)
            after = Job.objects.filter(revision=revision, kind=JobKind.NEIGHBOURS).first()
            if after is not None:
                jobs.repeat(after)
        if priority == jobs.WAITED_FOR:
            jobs.hasten(job)
    job.refresh_from_db()
    return job


def sketches(revision: Revision) -> Iterator[Sketch]:
    """Those of every other living expert's revisions on the same base, newest first."""
    rows = Fingerprint.objects.filter(
        ~Q(sketch=b""),
        revision__base_model=revision.base_model_id,
        revision__expert__deleted_at=None,
        revision__derived_from=None,
    ).exclude(revision__expert=revision.expert_id)
    columns = ("revision_id", "revision__expert_id", "revision__expert__visibility", "sketch")
    found = rows.exclude(revision__expert=None).order_by("-revision_id").values_list(*columns)
    for number, expert, visibility, data in found.iterator(2000):
        yield Sketch(number, expert, visibility == Expert.Visibility.PUBLIC, of_bytes(data))


def of_bytes(data: bytes | memoryview) -> NDArray[np.float32]:
    """A sketch as it is stored, in float32."""
    return np.frombuffer(data, "<f2").astype(np.float32)
