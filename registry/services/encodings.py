"""Compressed forms of a revision: derived from its files, made when asked for, kept beside them, rebuilt at will."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from django.conf import settings
from django.db import transaction

from registry import jobs, selectors
from registry.checks.compression import INT4, Choice, Form
from registry.errors import Fault, FileNotFound, FormFailed, FormPending, RateExceeded
from registry.jobs import JobKind
from registry.models import Encoded, Job, Revision, User
from registry.services import blobs
from registry.services.blobs import Staged

# Says of a job that it makes a form beside the revision's own.
EXTRA = "extra"
ON_REQUEST = (JobKind.COMPRESS, JobKind.RECONSTRUCT)
OPEN = (Job.State.QUEUED, Job.State.RUNNING)


def record(
    *,
    revision: Revision,
    form: Form,
    is_own: bool,
    staged: Staged,
    original_bytes: int,
    report: dict[str, Any],
) -> Encoded:
    """Keep an encoded file and its report; a second run of the same work finds the first one's row.

    `is_own` marks the form that stands for the revision when none is named; there is one. `original_bytes` are those
    of the same tensors at two bytes a value. The staged file is consumed.
    """
    blob = blobs.keep(staged)
    with transaction.atomic():
        Revision.objects.select_for_update(of=("self",)).get(pk=revision.pk)
        blobs.touch([blob.pk])
        written: dict[str, Any] = {"blob": blob, "original_bytes": original_bytes, "report": report}
        if is_own:
            Encoded.objects.filter(revision=revision, is_own=True).update(is_own=False)
            written["is_own"] = True
        encoded, _ = Encoded.objects.update_or_create(
            revision=revision, preset=form.preset, density=form.density, variant=form.variant, defaults=written
        )
    return encoded


def find(revision: Revision, choice: Choice | None) -> Encoded | None:
    """The form that was chosen, or the revision's own; None while there is none."""
    if choice is None:
        return selectors.encoded(revision)
    return by_form(revision, form_of(revision, choice))


def by_form(revision: Revision, form: Form) -> Encoded | None:
    rows = Encoded.objects.filter(revision=revision, preset=form.preset, density=form.density, variant=form.variant)
    return rows.select_related("blob").first()


def form_of(revision: Revision, choice: Choice) -> Form:
    return choice.form(revision.base_model.parameter_count if revision.base_model else None)


def obtain(
    *, revision: Revision, choice: Choice | None, user: User | None, permit: Callable[[], object] | None = None
) -> Encoded:
    """The form when it is there; else a job makes it, and FormPending names that job.

    `permit` is called before work is started for a form that not every reader may have made, and raises when the
    caller may not. Two requests for one form meet at one job. Raises FormPending, FormFailed with the job's reason,
    FileNotFound for a revision of which nothing can be made, RateExceeded.
    """
    encoded = find(revision, choice)
    if encoded is not None:
        return encoded
    check_source(revision)
    job = _job_of(revision, choice)
    if job is not None and job.state == Job.State.DONE:
        # It may have ended between the two look-ups.
        encoded = find(revision, choice)
        if encoded is not None:
            return encoded
    is_over = job is not None and job.after_id is None and job.state in {Job.State.DONE, Job.State.CANCELLED}
    if job is None or is_over:
        if permit is not None and choice is not None and not form_of(revision, choice).is_standard:
            permit()
        job = _ask(revision, choice, job, user=user)
    raise outcome(job)


def outcome(job: Job) -> FormPending | FormFailed | FileNotFound:
    """What to tell somebody who waits for what a job makes, and it is not there."""
    if job.state == Job.State.NOT_APPLICABLE:
        return FileNotFound(f"This revision has no compressed form: {job.message or 'there is nothing to compress.'}")
    if job.state not in {Job.State.FAILED, Job.State.CANCELLED}:
        return FormPending(f"It is being made: job {job.pk} is {job.state}, {job.progress:.0%} done.", job_id=job.pk)
    error = job.error or {}
    reason = error.get("detail") or job.message or "It was cancelled."
    fault = Fault("/job", job.state, "done", "Who may write to the expert can try the job again.")
    return FormFailed(f"Job {job.pk} {job.state}: {reason}", job_id=job.pk, faults=[fault, *_faults(error)])


def check_source(revision: Revision) -> None:
    """Whether anything can be derived from a revision. Raises FileNotFound."""
    if revision.state == Revision.State.INCOMPLETE:
        raise FileNotFound("This revision has no compressed form: config or weights are missing.")
    if revision.derived_from_id is not None:
        raise FileNotFound("This revision was made from a compressed form; ask for the revision that it was made of.")


def check_queue(user: User | None) -> None:
    """Raises RateExceeded when too much that this user, or anonymous readers together, asked for is still waiting."""
    waiting = Job.objects.filter(requested_by=user, kind__in=ON_REQUEST, after=None, state__in=OPEN).count()
    limit = settings.HUB_COMPRESS_MAX_QUEUED
    if waiting >= limit:
        whose = "You have" if user else "Readers without an account have"
        fault = Fault("", waiting, f"fewer than {limit} forms waiting", "Wait for one to be made.", "L2")
        raise RateExceeded(f"{whose} {waiting} compressed forms waiting.", faults=[fault], retry_after_seconds=10)


def unfinished(revision: Revision) -> dict[Form, Job]:
    """The jobs that make forms of a revision and have come to nothing yet, by form."""
    rows = Job.objects.filter(revision=revision, kind=JobKind.COMPRESS).order_by("created_at")
    return {
        form_of(revision, Choice.of(row.parameters)): row
        for row in rows.exclude(state__in=[Job.State.DONE, Job.State.CANCELLED])
    }


def _job_of(revision: Revision, choice: Choice | None) -> Job | None:
    """The job that makes this form: the pipeline's own while it does, or the one that was asked for before."""
    own = jobs.of_pipeline(revision.pk).filter(kind=JobKind.COMPRESS).first()
    if own is not None:
        if choice is None and own.state != Job.State.DONE:
            return own
        if choice is not None and own.state in OPEN:
            made = form_of(revision, Choice.of(own.parameters))
            if made == form_of(revision, choice):
                return own
    return Job.objects.filter(key=_key(revision, choice)).first()


def _ask(revision: Revision, choice: Choice | None, job: Job | None, *, user: User | None) -> Job:
    """Start the job, or start it again."""
    check_queue(user)
    if job is not None:
        jobs.repeat(job)
        job.refresh_from_db()
        return job
    if choice is None:
        parameters = _own_parameters(revision)
    else:
        # Written down, so that a base model that is found to be larger later does not change what was asked for.
        density = None if choice.preset == INT4 else form_of(revision, choice).density
        parameters = {**replace(choice, density=density).as_dict(), EXTRA: True}
    with transaction.atomic():
        return jobs.enqueue(
            JobKind.COMPRESS,
            revision=revision,
            key=_key(revision, choice),
            parameters=parameters,
            user=user,
            priority=jobs.WAITED_FOR,
        )


def _own_parameters(revision: Revision) -> dict[str, Any]:
    """What the pipeline made its form by; the density is that of its result, whatever the base model has grown to."""
    own = jobs.of_pipeline(revision.pk).filter(kind=JobKind.COMPRESS).first()
    if own is None:
        return {}
    choice = Choice.of(own.parameters)
    if choice.density is None and choice.preset != INT4:
        choice = replace(choice, density=(own.result or {}).get("density"))
    return choice.as_dict()


def _key(revision: Revision, choice: Choice | None) -> str:
    form = "own" if choice is None else form_of(revision, choice).key
    return f"{JobKind.COMPRESS}:r{revision.pk}:{form}"


def _faults(error: dict[str, Any]) -> list[Fault]:
    """The faults of a job's error, as they were told."""
    return [
        Fault(row.get("pointer", ""), row.get("met"), row.get("wanted"), row.get("remedy", ""), row.get("rule", ""))
        for row in error.get("errors", [])
    ]
