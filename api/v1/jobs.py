"""Jobs: how far background work is; stop it; try it again."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry import jobs, selectors
from registry.errors import NotAllowed
from registry.models import Job, User


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
        user = require(request, "write")
        job = selectors.job(job_id, user)
        check_command(user, job)
        jobs.cancel(job)
        return Response(records.job(selectors.job(job_id, user)))


class RetryJob(View):
    """POST to try a failed or cancelled job again, and what was cancelled because of it."""

    @extend_schema(
        operation_id="jobs_retry", request=None, responses={200: schemas.JobRecord, **schemas.problems(403, 404)}
    )
    def post(self, request: Request, job_id: str) -> Response:
        user = require(request, "write")
        job = selectors.job(job_id, user)
        check_command(user, job)
        jobs.retry([job, *selectors.jobs_after(job)])
        return Response(records.job(selectors.job(job_id, user)))


def check_command(user: User, job: Job) -> None:
    """Who asked for a job may command it, and who may write to its expert."""
    if user.is_staff or job.requested_by_id == user.pk:
        return
    expert = job.revision.expert if job.revision else None
    if expert is None or not selectors.may_write(user, expert.namespace.name):
        raise NotAllowed("This job was asked for by somebody else.")
