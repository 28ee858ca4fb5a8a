"""Jobs: how far background work is; stop it; try it again."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry import jobs, selectors
from registry.errors import NotAllowed
from registry.jobs import JobKind
from registry.models import Job, User

OF_MERGES = frozenset({JobKind.MERGE, JobKind.KINSHIP})


class OneJob(View):
    """GET a job."""

    @extend_schema(operation_id="jobs_read", responses={200: schemas.JobRecord, **schemas.problems(404)})
    def get(self, request: Request, job_id: str) -> Response:
        return Response(records.job(selectors.job(job_id, viewer_of(request))))


class CancelJob(View):
    """POST to stop a job that has not ended."""

    @extend_schema(
        operation_id="jobs_cancel", request=None, responses={200: schemas.JobRecord, **schemas.problems(403, 404)}
    )
    def post(self, request: Request, job_id: str) -> Response:
        user, job = commanded(request, job_id)
        jobs.cancel(job)
        return Response(records.job(selectors.job(job_id, user)))


class RetryJob(View):
    """POST to try a failed or cancelled job again, and what was cancelled because of it."""

    @extend_schema(
        operation_id="jobs_retry", request=None, responses={200: schemas.JobRecord, **schemas.problems(403, 404)}
    )
    def post(self, request: Request, job_id: str) -> Response:
        user, job = commanded(request, job_id)
        jobs.retry([job, *selectors.jobs_after(job)])
        return Response(records.job(selectors.job(job_id, user)))


def commanded(request: Request, job_id: str) -> tuple[User, Job]:
    """A job and the caller, who may command it: who asked for it, and who may write to its expert.

    Whoever may have work done may have it stopped, so work on merges takes scope merge. Raises JobNotFound,
    Unauthenticated, ScopeMissing, NotAllowed.
    """
    job = selectors.job(job_id, viewer_of(request))
    user = require(request, "merge" if job.kind in OF_MERGES else "write")
    if user.is_staff or job.requested_by_id == user.pk:
        return user, job
    expert = job.revision.expert if job.revision else None
    if expert is None or not selectors.may_write(user, expert.namespace.name):
        raise NotAllowed("This job was asked for by somebody else.")
    return user, job
