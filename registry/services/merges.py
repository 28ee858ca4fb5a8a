"""Merges: a recipe gets its address at once, is computed once, and is readable by whoever may read all its parents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from registry import jobs
from registry.errors import Fault, RateExceeded
from registry.jobs import JobKind
from registry.models import File, Job, Merge, MergeParent, Recipe, Revision, User
from registry.services import audit, blobs, recipes
from registry.services.blobs import Staged


def register(*, user: User, body: Mapping[str, Any]) -> tuple[Merge, bool]:
    """Register a recipe and ask for its computation; the second value says whether this call made or restarted it.

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
            },
        )
        merge = Merge.objects.select_for_update(of=("self",)).get(pk=merge.pk)
        if is_new:
            check_queue(user)
            MergeParent.objects.bulk_create(
                MergeParent(merge=merge, revision=parent, weight=expert.weight, position=position)
                for position, (parent, expert) in enumerate(zip(resolved.parents, recipe.experts, strict=True))
            )
            jobs.enqueue(JobKind.MERGE, merge=merge, user=user)
            audit.record(user, "merge.register", merge.full_name, method=recipe.method)
        elif merge.state in {Merge.State.FAILED, Merge.State.CANCELLED}:
            check_queue(user)
            merge.state = Merge.State.QUEUED
            merge.save(update_fields=["state"])
            jobs.retry(Job.objects.filter(merge=merge, kind=JobKind.MERGE))
            is_new = True
    return merge, is_new


def check_queue(user: User) -> None:
    """Raises RateExceeded when a user has too many merges waiting."""
    waiting = Job.objects.filter(
        requested_by=user, kind=JobKind.MERGE, state__in=[Job.State.QUEUED, Job.State.RUNNING]
    ).count()
    if waiting >= settings.HUB_MERGE_MAX_QUEUED:
        fault = Fault(
            "", waiting, f"fewer than {settings.HUB_MERGE_MAX_QUEUED} merges waiting", "Wait for one to end.", "L2"
        )
        raise RateExceeded(f"You have {waiting} merges waiting.", faults=[fault], retry_after_seconds=10)


def finish(*, merge: Merge, staged: Mapping[str, Staged], report: dict[str, Any]) -> Revision:
    """Publish the result of a merge; the first result stays, whoever else computed it meanwhile."""
    kept = {path: blobs.keep(one) for path, one in staged.items()}
    with transaction.atomic():
        row = Merge.objects.select_for_update(of=("self",)).get(pk=merge.pk)
        known = Revision.objects.filter(merge=row).first()
        if known is not None:
            return known
        blobs.touch(blob.pk for blob in kept.values())
        revision = Revision.objects.create(
            merge=row,
            commit=row.commit,
            manifest_digest=blobs.manifest((path, blob.pk, blob.size_bytes) for path, blob in kept.items()),
            message=f"Merge by {row.recipe.method}",
            author=row.requested_by,
            state=Revision.State.READY,
            base_model=row.base_model,
            adapter_kind="lora",
            rank=report.get("rank"),
            facts={"warnings": report.get("warnings", [])},
        )
        File.objects.bulk_create(
            File(revision=revision, path=path, blob=blob, is_large=path.endswith(".safetensors"))
            for path, blob in sorted(kept.items())
        )
        row.state, row.report, row.finished_at = Merge.State.READY, report, timezone.now()
        row.save(update_fields=["state", "report", "finished_at"])
    return revision


def stage_folder(folder: Path) -> dict[str, Staged]:
    """Every file of a folder, hashed where it lies."""
    return {path.name: blobs.stage_file(path) for path in sorted(folder.iterdir())}
