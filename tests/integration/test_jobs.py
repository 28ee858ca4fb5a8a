"""The job outbox: rows, leases and messages, over the real PostgreSQL and Redis."""

import threading
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.utils import timezone

from registry import jobs
from registry.errors import UploadInvalid
from registry.jobs import JobKind
from registry.models import Expert, Job, Namespace, Revision
from registry.services import accounts

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def revision() -> Revision:
    user = accounts.create_user(name="ann", password="correct horse battery")
    expert = Expert.objects.create(namespace=Namespace.objects.get(name="ann"), name="e", key="e", created_by=user)
    return Revision.objects.create(expert=expert, commit="a" * 40, manifest_digest="b" * 64)


@pytest.fixture
def pipeline(revision: Revision, queue) -> list[Job]:
    with transaction.atomic():
        return jobs.enqueue_pipeline(revision)


def passed(job: Job, **extra) -> None:
    lease = jobs.claim(job.pk)
    assert lease is not None
    assert jobs.finish(lease, **extra)


def states(pipeline: list[Job]) -> list[str]:
    return [Job.objects.get(pk=job.pk).state for job in pipeline]


def test_a_job_is_sent_when_its_transaction_commits_and_not_before(revision: Revision, queue) -> None:
    with transaction.atomic():
        job = jobs.enqueue(JobKind.CHECK, revision=revision)
        assert queue("light") == 0
    assert queue("light") == 1
    assert Job.objects.get(pk=job.pk).sent_at is not None


def test_a_transaction_that_fails_leaves_neither_row_nor_message(revision: Revision, queue) -> None:
    def ask_and_fail() -> None:
        jobs.enqueue_pipeline(revision)
        raise UploadInvalid

    with pytest.raises(UploadInvalid):
        transaction.atomic(ask_and_fail)()
    assert Job.objects.count() == 0
    assert queue("light") == queue("heavy") == 0


def test_asking_twice_for_the_same_work_makes_one_job(revision: Revision, queue) -> None:
    first = jobs.enqueue(JobKind.CHECK, revision=revision)
    assert jobs.enqueue(JobKind.CHECK, revision=revision).pk == first.pk
    assert Job.objects.count() == 1
    assert queue("light") == 1


def test_the_pipeline_runs_in_order_and_makes_the_revision_ready(
    pipeline: list[Job], revision: Revision, queue
) -> None:
    assert [job.kind for job in pipeline] == ["check", "compress", "embed", "index"]
    assert (queue("light"), queue("heavy")) == (1, 0)
    assert jobs.claim(pipeline[1].pk) is None
    passed(pipeline[0])
    assert queue("heavy") == 1
    passed(pipeline[1], state=Job.State.NOT_APPLICABLE, message="nothing to compress")
    passed(pipeline[2])
    revision.refresh_from_db()
    assert revision.state == Revision.State.PROCESSING
    passed(pipeline[3])
    revision.refresh_from_db()
    assert revision.state == Revision.State.READY
    assert states(pipeline) == ["done", "not_applicable", "done", "done"]


def test_a_failure_keeps_its_error_and_cancels_what_waits(pipeline: list[Job], revision: Revision) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    jobs.fail(lease, UploadInvalid("The bytes changed.").as_dict())
    assert states(pipeline) == ["failed", "cancelled", "cancelled", "cancelled"]
    assert Job.objects.get(pk=pipeline[0].pk).error["code"] == "upload-invalid"
    revision.refresh_from_db()
    assert revision.state == Revision.State.FAILED


def test_retrying_opens_a_failed_chain_again(pipeline: list[Job], revision: Revision, queue) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    jobs.fail(lease, {})
    jobs.retry(pipeline)
    assert states(pipeline) == ["queued"] * 4
    assert queue("light") == 2
    revision.refresh_from_db()
    assert revision.state == Revision.State.PROCESSING
    passed(pipeline[0])


def test_a_claimed_job_is_nobody_elses(pipeline: list[Job]) -> None:
    assert jobs.claim(pipeline[0].pk) is not None
    assert jobs.claim(pipeline[0].pk) is None


def test_of_many_workers_that_claim_at_once_one_gets_the_job(pipeline: list[Job]) -> None:
    ready, got = threading.Barrier(8), []

    def work() -> None:
        ready.wait()
        got.append(jobs.claim(pipeline[0].pk))
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in got) == 1


def test_a_claim_does_not_wait_for_a_locked_row(pipeline: list[Job]) -> None:
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            Job.objects.select_for_update().get(pk=pipeline[0].pk)
            locked.set()
            done.wait(10)
        connection.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(10)
    assert jobs.claim(pipeline[0].pk) is None
    done.set()
    holder.join()
    assert jobs.claim(pipeline[0].pk) is not None


def test_a_worker_that_lost_its_lease_cannot_write_any_more(pipeline: list[Job]) -> None:
    dead = jobs.claim(pipeline[0].pk)
    assert dead is not None
    Job.objects.filter(pk=pipeline[0].pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    alive = jobs.claim(pipeline[0].pk)
    assert alive is not None
    assert alive.owner != dead.owner
    assert not jobs.heartbeat(dead, progress=0.9)
    assert not jobs.finish(dead, result={"from": "the dead"})
    assert not jobs.fail(dead, {})
    assert jobs.finish(alive, result={"from": "the living"})
    job = Job.objects.get(pk=pipeline[0].pk)
    assert (job.result, job.attempt) == ({"from": "the living"}, 2)


def test_a_heartbeat_extends_the_lease_and_tells_progress(pipeline: list[Job], settings) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    Job.objects.filter(pk=lease.job_id).update(lease_until=timezone.now() + timedelta(seconds=1))
    assert jobs.heartbeat(lease, progress=0.25, message="Reading")
    job = Job.objects.get(pk=lease.job_id)
    assert (job.progress, job.message) == (0.25, "Reading")
    assert job.lease_until > timezone.now() + timedelta(seconds=settings.HUB_JOB_LEASE_SECONDS - 5)


def test_a_job_whose_worker_dies_every_time_is_parked_with_a_reason(pipeline: list[Job], settings) -> None:
    for _ in range(settings.HUB_JOB_MAX_ATTEMPTS):
        assert jobs.claim(pipeline[0].pk) is not None
        Job.objects.filter(pk=pipeline[0].pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    assert jobs.claim(pipeline[0].pk) is None
    job = Job.objects.get(pk=pipeline[0].pk)
    assert job.state == Job.State.FAILED
    assert "tried 5 times" in job.error["detail"]


def test_the_sweeper_sends_lost_and_orphaned_jobs_again_and_no_others(pipeline: list[Job], queue, settings) -> None:
    settings.HUB_JOB_SWEEP_SECONDS = 30
    assert jobs.sweep() == 0
    long_ago = timezone.now() - timedelta(seconds=31)
    Job.objects.update(created_at=long_ago, sent_at=long_ago)
    assert jobs.sweep() == 1  # the others wait for the first
    assert queue("light") == 2
    assert jobs.sweep() == 0
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    assert jobs.sweep() == 0
    Job.objects.filter(pk=lease.job_id).update(lease_until=timezone.now() - timedelta(seconds=1))
    assert jobs.sweep() == 1


def test_a_postponed_job_waits_in_the_queue_without_using_up_its_attempts(pipeline: list[Job]) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    jobs.postpone(lease, seconds=1, reason="The router is loading.")
    job = Job.objects.get(pk=lease.job_id)
    assert (job.state, job.attempt, job.message) == ("queued", 0, "The router is loading.")
    assert jobs.claim(job.pk) is not None


def test_a_job_that_was_postponed_for_too_long_fails_with_the_reason(pipeline: list[Job], settings) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    Job.objects.update(created_at=timezone.now() - timedelta(seconds=settings.HUB_JOB_MAX_SECONDS + 1))
    jobs.postpone(lease, seconds=1, reason="The router is away.")
    assert states(pipeline)[:2] == ["failed", "cancelled"]
    assert Job.objects.get(pk=lease.job_id).error["detail"] == "The router is away."


def test_cancelling_ends_a_waiting_job_and_stops_a_running_one(pipeline: list[Job]) -> None:
    lease = jobs.claim(pipeline[0].pk)
    assert lease is not None
    jobs.cancel(Job.objects.get(pk=lease.job_id))
    assert not jobs.heartbeat(lease)
    assert Job.objects.get(pk=lease.job_id).state == "running"
    jobs.cancel(Job.objects.get(pk=pipeline[1].pk))
    assert states(pipeline)[1:] == ["cancelled"] * 3


def test_every_kind_of_job_has_a_function_and_every_function_a_kind() -> None:
    import importlib
    import pkgutil

    import workers.jobs

    found = {module.name for module in pkgutil.iter_modules(workers.jobs.__path__)}
    assert found == {kind.value for kind in JobKind}
    for kind in JobKind:
        assert callable(importlib.import_module(f"workers.jobs.{kind}").run)
