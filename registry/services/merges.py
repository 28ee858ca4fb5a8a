"""Merges: a recipe gets its address at once, is computed when somebody touches it, and is readable by whoever may
read all its parents.

The first result decides what its bytes are. Weights that nobody reads are removed after a time and computed again for
the next reader, who gets them only when they are the same.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from registry import jobs, selectors
from registry.checks import files
from registry.errors import Fault, MergeFailed, MergeNotReproduced, MergePending, NotReady, RateExceeded
from registry.jobs import JobKind
from registry.models import Blob, File, Job, Merge, MergeParent, Recipe, Revision, User
from registry.services import audit, blobs, recipes
from registry.services.blobs import Staged

# Of these states a merge is brought to life by whoever touches it; one that failed only by who asks for it again.
SLEEPING = (Merge.State.REGISTERED, Merge.State.CANCELLED)
LARGE_ENDINGS = (".safetensors", ".compeft")
# What tells of a merge, whatever it becomes.
TEXTS = ("README.md", "lineage.json", "recipe.json", "report.json")
# What the recipe decides beside the weights; the other files tell of it.
CONFIGS = frozenset({files.CONFIG, "config.json", "delta.json", "model.safetensors.index.json"})
READ_EVERY = timedelta(hours=1)


def register(*, user: User, body: Mapping[str, Any], start: bool = True) -> tuple[Merge, bool]:
    """Register a recipe and, unless told otherwise, have it computed; the second value says whether this call made or
    started it.

    Raises RecipeInvalid, ExpertNotFound, RevisionNotFound, NotReady, ExpertsIncompatible, RateExceeded.
    """
    resolved = recipes.resolve(viewer=user, body=body)
    recipe = resolved.recipe
    base_model = resolved.parents[0].base_model
    assert base_model is not None, "a revision that is ready has a base"
    with transaction.atomic():
        row, _ = Recipe.objects.get_or_create(
            digest=recipe.digest,
            defaults={"canonical": recipe.canonical().decode(), "method": recipe.method, "created_by": user},
        )
        merge, is_new = Merge.objects.get_or_create(
            recipe=row,
            defaults={
                "id": resolved.merge_id,
                "commit": resolved.commit,
                "base_model": base_model,
                "requested_by": user,
                "state": Merge.State.REGISTERED,
                "licence": resolved.licence,
            },
        )
        merge = _locked(merge)
        if resolved.licence["acknowledged"] and not merge.licence.get("acknowledged"):
            merge.licence = resolved.licence
            merge.save(update_fields=["licence"])
        if is_new:
            MergeParent.objects.bulk_create(
                MergeParent(merge=merge, revision=parent, weight=expert.weight, position=position)
                for position, (parent, expert) in enumerate(zip(resolved.parents, recipe.experts, strict=True))
            )
            audit.record(user, "merge.register", merge.full_name, method=recipe.method)
        is_started = start and merge.state in {*SLEEPING, Merge.State.FAILED}
        if is_started:
            _start(merge, user=user, priority=jobs.ASKED_FOR)
    return merge, is_new or is_started


def touch(merge: Merge) -> Job:
    """The job that computes a merge for a reader who waits; it is started for the user who registered the merge.

    Raises MergeFailed, RateExceeded when that user has too many merges waiting.
    """
    if merge.state in SLEEPING:
        with transaction.atomic():
            row = _locked(merge)
            if row.state in SLEEPING:
                _start(row, user=row.requested_by, priority=jobs.WAITED_FOR)
    job = selectors.job_of_merge(merge)
    assert job is not None, "a merge that does not sleep has a job"
    if job.state == Job.State.FAILED:
        raise outcome(merge, job)
    if job.priority > jobs.WAITED_FOR:
        jobs.hasten(job)
    return job


def outcome(merge: Merge, job: Job) -> MergePending | MergeFailed:
    """What to tell somebody who waits for a merge that is not there."""
    if job.state not in {Job.State.FAILED, Job.State.CANCELLED}:
        told = f"{merge.full_name} is being computed: job {job.pk} is {job.state}, {job.progress:.0%} done."
        return MergePending(told, job_id=job.pk)
    error = job.error or {}
    reason = error.get("detail") or job.message or "It was cancelled."
    fault = Fault("/job", job.state, "done", "Ask for the merge again with POST /api/v1/merges.")
    faults = [Fault(**row) for row in error.get("errors", [])]
    return MergeFailed(
        f"{merge.full_name} could not be computed: job {job.pk} {job.state}: {reason}",
        job_id=job.pk,
        faults=[fault, *faults],
    )


def note_read(merge: Merge) -> None:
    """Remember that somebody reads a merge; within an hour of the last time this writes nothing."""
    now = timezone.now()
    if merge.read_at is None or now - merge.read_at > READ_EVERY:
        Merge.objects.filter(pk=merge.pk).update(read_at=now)


def _locked(merge: Merge) -> Merge:
    return Merge.objects.select_for_update(of=("self",)).select_related("recipe", "requested_by").get(pk=merge.pk)


def _start(merge: Merge, *, user: User | None, priority: int) -> None:
    """Have a merge computed whose row is locked: by a new job, or by its old one once more. Raises RateExceeded."""
    check_queue(user)
    merge.state = Merge.State.QUEUED
    merge.save(update_fields=["state"])
    job = jobs.enqueue(JobKind.MERGE, merge=merge, user=user, priority=priority)
    jobs.renew(job, user=user, priority=priority)


def check_queue(user: User | None) -> None:
    """Raises RateExceeded when a user has too many merges waiting."""
    if user is not None:
        # Of several requests at once each sees what the others have started.
        User.objects.select_for_update(no_key=True).get(pk=user.pk)
    waiting = Job.objects.filter(
        requested_by=user, kind=JobKind.MERGE, state__in=[Job.State.QUEUED, Job.State.RUNNING]
    ).count()
    if waiting >= settings.HUB_MERGE_MAX_QUEUED:
        fault = Fault(
            "", waiting, f"fewer than {settings.HUB_MERGE_MAX_QUEUED} merges waiting", "Wait for one to end.", "L2"
        )
        raise RateExceeded(
            f"Whoever registered this merge has {waiting} merges waiting.", faults=[fault], retry_after_seconds=10
        )


def finish(*, merge: Merge, staged: Mapping[str, Staged], report: dict[str, Any]) -> Revision:
    """Publish the result of a merge. The first result stays; a later one gives back the weights that were removed.

    Raises MergeNotReproduced when it has other bytes than the first, NotReady when the merge was stopped meanwhile.
    """
    kept = {path: blobs.keep(one) for path, one in staged.items()}
    digest = result_digest((path, blob) for path, blob in kept.items())
    with transaction.atomic():
        row = _locked(merge)
        revision = Revision.objects.filter(merge=row).first()
        if row.state == Merge.State.READY and revision is not None:
            return revision
        if row.state in {Merge.State.FAILED, *SLEEPING}:
            raise NotReady(f"{row.full_name} was stopped before its result was there.")
        _check_same(row, digest, report)
        if revision is None:
            revision = _publish(row, kept, report)
            row.result_digest, row.report = digest, report
        else:
            # The text files of the first time stand beside what it gave; only what was removed comes back.
            present = set(File.objects.filter(revision=revision).values_list("path", flat=True))
            _add_files(revision, {path: blob for path, blob in kept.items() if is_large(path) and path not in present})
            revision.state = Revision.State.READY
            revision.save(update_fields=["state"])
        row.state, row.finished_at = Merge.State.READY, timezone.now()
        row.save(update_fields=["state", "report", "result_digest", "finished_at"])
    return revision


def _publish(row: Merge, kept: Mapping[str, Blob], report: dict[str, Any]) -> Revision:
    revision = Revision.objects.create(
        merge=row,
        commit=row.commit,
        manifest_digest=blobs.manifest((path, blob.pk, blob.size_bytes) for path, blob in kept.items()),
        message=f"Merge by {row.recipe.method}",
        author=row.requested_by,
        state=Revision.State.READY,
        base_model=row.base_model,
        adapter_kind=output_kind(row),
        rank=report.get("rank"),
        facts={"warnings": report.get("warnings", [])},
    )
    _add_files(revision, kept)
    return revision


def _add_files(revision: Revision, kept: Mapping[str, Blob]) -> None:
    blobs.touch(blob.pk for blob in kept.values())
    File.objects.bulk_create(
        File(revision=revision, path=path, blob=blob, is_large=is_large(path)) for path, blob in sorted(kept.items())
    )


def _check_same(row: Merge, digest: str, report: Mapping[str, Any]) -> None:
    """Raises MergeNotReproduced when the first result had other bytes."""
    if row.result_digest in {"", digest}:
        return
    met = {"digest": digest, "environment": report.get("environment")}
    wanted = {"digest": row.result_digest, "environment": row.report.get("environment")}
    remedy = "Compute it with the versions and on the kind of device of the first time, or register a new recipe."
    raise MergeNotReproduced(
        f"{row.full_name} has the digest {row.result_digest}, and came out as {digest}.",
        faults=[Fault("/result_digest", met, wanted, remedy)],
    )


def is_large(path: str) -> bool:
    """Whether a file of a merge holds weights: told by SHA-256, and removed when nobody reads them."""
    return path.endswith(LARGE_ENDINGS)


def result_digest(kept: Iterable[tuple[str, Blob]]) -> str:
    """What a result is: the manifest of its weights and configs, without the files that tell of it."""
    return blobs.manifest((path, blob.pk, blob.size_bytes) for path, blob in kept if is_large(path) or path in CONFIGS)


def output_kind(merge: Merge) -> str:
    """What a merge becomes: lora, ia3, delta, ternary or full."""
    output = json.loads(merge.recipe.canonical).get("output", {})
    return str(output.get("kind", "lora"))


def names(merge: Merge) -> tuple[str, ...] | None:
    """The files of a merge where they are known before it is computed; None where their number depends on sizes."""
    if output_kind(merge) not in {"lora", "ia3"}:
        return None
    return tuple(sorted((*TEXTS, files.CONFIG, files.WEIGHTS)))


def collect() -> int:
    """Remove the weights of merges that nobody has read for HUB_MERGE_KEEP_DAYS; returns of how many.

    Card, recipe, lineage and config stay, so that behind a commit no byte ever changes.
    """
    before = timezone.now() - timedelta(days=settings.HUB_MERGE_KEEP_DAYS)
    count = 0
    for merge_id in list(_unread(before).values_list("pk", flat=True)[:1000]):
        with transaction.atomic():
            row = _unread(before).select_for_update(skip_locked=True, of=("self",)).filter(pk=merge_id).first()
            if row is None:
                continue
            every = File.objects.filter(revision__merge=row).select_related("blob")
            # Merges of earlier versions of the hub have none yet.
            row.result_digest = row.result_digest or result_digest((file.path, file.blob) for file in every)
            weights = [file for file in every if is_large(file.path)]
            # The grace time begins now, for downloads that have begun.
            blobs.touch(file.blob_id for file in weights)
            File.objects.filter(pk__in=[file.pk for file in weights]).delete()
            Revision.objects.filter(merge=row).update(state=Revision.State.INCOMPLETE)
            row.state = Merge.State.REGISTERED
            row.save(update_fields=["state", "result_digest"])
            count += 1
    return count


def _unread(before: datetime) -> QuerySet[Merge]:
    never = Q(read_at=None, finished_at__lt=before)
    return Merge.objects.filter(Q(read_at__lt=before, finished_at__lt=before) | never, state=Merge.State.READY)


def stage_folder(folder: Path) -> dict[str, Staged]:
    """Every file of a folder, hashed where it lies."""
    return {path.name: blobs.stage_file(path) for path in sorted(folder.iterdir())}
