"""The compressed expert as ordinary files: `compeft-k10` names the head of `main` with the weights that its compressed
form at 10 % decodes to, so that clients that know nothing of compression load it.

Name, commit and all files but the weights are known before anything is computed. A reconstruction is a Revision that
stands beside the history; its commit keeps its bytes, and when the head moves the name leads to a new one.
"""

import hashlib
import json
from dataclasses import dataclass

from django.db import transaction

from registry import jobs, selectors
from registry.checks import files
from registry.checks.compression import DEFAULT, STANDARD_DENSITIES, Choice
from registry.errors import FileNotFound, FormFailed, FormPending, RevisionNotFound
from registry.jobs import JobKind
from registry.models import Blob, Encoded, Expert, File, Job, Revision, User
from registry.services import blobs, encodings
from registry.services.blobs import Staged

# compeft-k10 -> 0.1
DENSITIES = {f"compeft-k{density * 100:.0f}": density for density in STANDARD_DENSITIES}
# Part of every commit: raise it when the same weights would come out as other bytes.
VERSION = 1
COMMIT, FORM = "commit", "form"


@dataclass(frozen=True)
class Reconstruction:
    """What a name or a commit means; `revision` is None until the weights are there."""

    source: Revision
    form: str
    commit: str
    revision: Revision | None

    @property
    def choice(self) -> Choice:
        return Choice(DEFAULT, DENSITIES[self.form])


def named(expert: Expert, form: str) -> Reconstruction | None:
    """The reconstruction of the present head by its form's name; None for other names. Raises RevisionNotFound."""
    if form not in DENSITIES:
        return None
    source = selectors.head(expert)
    if source is None or source.state == Revision.State.INCOMPLETE:
        raise RevisionNotFound(f"{expert.full_name} has no weights to compress.")
    return _of(source, form)


def promised(expert: Expert, commit: str) -> Reconstruction | None:
    """The reconstruction under a commit that was told before the weights were there."""
    if not selectors.COMMIT.fullmatch(commit):
        return None
    job = Job.objects.filter(
        kind=JobKind.RECONSTRUCT, revision__expert=expert, parameters__contains={COMMIT: commit}
    ).first()
    return None if job is None or job.revision is None else _of(job.revision, job.parameters[FORM])


def commit_of(source: Revision, form: str) -> str:
    """The 40 hexadecimal digits under which the reconstruction will be found."""
    parts = [source.commit, DEFAULT, DENSITIES[form], VERSION]
    return hashlib.sha1(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()


def ask(found: Reconstruction, *, user: User | None) -> Job:
    """The job that makes the weights, started when nobody has asked before.

    Raises FormFailed when it failed, RevisionNotFound when there is nothing to compress, RateExceeded.
    """
    key = f"{JobKind.RECONSTRUCT}:r{found.source.pk}:{found.form}"
    job = Job.objects.filter(key=key).first()
    if job is None:
        encodings.check_queue(user)
        parameters = {FORM: found.form, COMMIT: found.commit}
        with transaction.atomic():
            return jobs.enqueue(
                JobKind.RECONSTRUCT,
                revision=found.source,
                key=key,
                parameters=parameters,
                user=user,
                priority=jobs.WAITED_FOR,
            )
    if job.state in {Job.State.DONE, Job.State.CANCELLED} and made_of(found.source, found.form) is None:
        encodings.check_queue(user)
        jobs.repeat(job)
        job.refresh_from_db()
    if job.state in {Job.State.FAILED, Job.State.NOT_APPLICABLE}:
        raise outcome(job)
    return job


def outcome(job: Job) -> FormPending | FormFailed | RevisionNotFound:
    """What to tell somebody who waits for a reconstruction that is not there."""
    told = encodings.outcome(job)
    return RevisionNotFound(told.detail) if isinstance(told, FileNotFound) else told


def made_of(source: Revision, form: str) -> Revision | None:
    return Revision.objects.filter(derived_from=source, form=form).first()


def finish(*, source: Revision, form: str, encoded: Encoded, weights: Staged) -> Revision:
    """Publish the decoded weights beside the other files of the source; the first result stays."""
    kept = blobs.keep(weights)
    with transaction.atomic():
        source = Revision.objects.select_for_update(of=("self",)).get(pk=source.pk)
        known = made_of(source, form)
        if known is not None:
            return known
        tree: dict[str, tuple[Blob, bool]] = {
            row.path: (row.blob, row.is_large) for row in File.objects.filter(revision=source).select_related("blob")
        }
        tree[files.WEIGHTS] = (kept, True)
        blobs.touch(blob.pk for blob, _ in tree.values())
        revision = Revision.objects.create(
            expert_id=source.expert_id,
            commit=commit_of(source, form),
            parent=source,
            derived_from=source,
            form=form,
            manifest_digest=blobs.manifest((path, blob.pk, blob.size_bytes) for path, (blob, _) in tree.items()),
            message=f"The weights that {encoded.blob_id} decodes to (ComPEFT, {encoded.density:.0%} kept)",
            state=Revision.State.READY,
            base_model_id=source.base_model_id,
            adapter_kind=source.adapter_kind,
            rank=source.rank,
            parameter_count=source.parameter_count,
            facts=source.facts,
        )
        File.objects.bulk_create(
            File(revision=revision, path=path, blob=blob, is_large=is_large)
            for path, (blob, is_large) in sorted(tree.items())
        )
    return revision


def _of(source: Revision, form: str) -> Reconstruction:
    return Reconstruction(source, form, commit_of(source, form), made_of(source, form))
