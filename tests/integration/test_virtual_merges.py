"""Merges as repositories that are computed when somebody reads them, and whose bytes stay the same for ever."""

import resource
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from celery import current_app
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from kombu import Queue

from api.hf import waiting
from registry import jobs
from registry.errors import MemoryExceeded, NotReady
from registry.models import Blob, Expert, File, Job, Membership, Merge, Namespace, Revision
from registry.services import cleaning, experts, keys, merges
from tests import factories, tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND, compute, ready, recipe, result
from workers import runner

pytestmark = pytest.mark.django_db
NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json", "recipe.json", "report.json"]
WEIGHTS = "adapter_model.safetensors"
# Every address by which somebody asks for a file of a merge, or for what lies in it.
DOORS = [
    ("GET", "/merges/{id}/resolve/main/adapter_model.safetensors"),
    ("HEAD", "/merges/{id}/resolve/{commit}/adapter_config.json"),
    ("GET", "/merges/{id}/raw/main/README.md"),
    ("GET", "/ann/first/resolve/merge--{id}/adapter_model.safetensors"),
    ("HEAD", "/ann/second/resolve/{commit}/adapter_config.json"),
    ("GET", "/api/models/merges/{id}/tree/main"),
    ("GET", "/api/models/ann/first/tree/merge--{id}"),
    ("GET", "/api/models/ann/second/tree/{commit}"),
    ("POST", "/api/models/merges/{id}/paths-info/main"),
]
# What is answered at once, whatever the state of the merge.
AT_ONCE = [
    ("GET", "/api/models/merges/{id}"),
    ("GET", "/api/models/merges/{id}/revision/main"),
    ("GET", "/api/models/merges/{id}/revision/{commit}"),
    ("GET", "/api/models/ann/first/revision/merge--{id}"),
    ("GET", "/api/models/ann/second/revision/{commit}"),
    ("GET", "/api/models/merges/{id}/refs"),
    ("GET", "/api/models/merges/{id}/commits/main"),
    ("GET", "/api/v1/merges/{id}"),
]


@pytest.fixture(autouse=True)
def no_holding(settings):
    settings.HUB_HOLD_SECONDS = 0


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def pair(ann):
    return ready(ann[0], "first", FIRST), ready(ann[0], "second", SECOND)


@pytest.fixture
def merge(ann, pair) -> Merge:
    """A merge that has an address and no job."""
    return merges.register(user=ann[0], body=recipe(), start=False)[0]


@pytest.fixture
def reader() -> hf.Caller:
    return hf.Caller()


def ask(caller: hf.Caller, door: tuple[str, str], merge: Merge):
    method, path = door
    address = path.format(id=merge.pk, commit=merge.commit)
    return caller.send(method, address, data=b"paths=README.md", kind="application/x-www-form-urlencoded")


def weights(caller: hf.Caller, merge: Merge) -> bytes:
    answer = caller.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
    assert answer.status_code == 200, answer.body
    return answer.body


def unread(merge: Merge, *, days: float) -> None:
    """Let this much time pass since anybody last read the merge."""
    then = timezone.now() - timedelta(days=days)
    Merge.objects.filter(pk=merge.pk).update(read_at=then, finished_at=then)


# Registered, and computed at the first touch


def test_a_merge_may_be_registered_without_being_computed(ann, pair) -> None:
    answer = ann[1].json("POST", "/api/v1/merges", recipe(start=False))
    assert (answer.status_code, answer.json()["state"], answer.json()["job"]) == (202, "registered", None)
    again = ann[1].json("POST", "/api/v1/merges", recipe(start=False))
    assert (again.status_code, again.json()["id"]) == (200, answer.json()["id"])
    assert Job.objects.filter(kind="merge").count() == 0
    started = ann[1].json("POST", "/api/v1/merges", recipe())
    assert (started.status_code, started.json()["state"]) == (202, "queued")
    assert started.json()["commit"] == answer.json()["commit"]
    assert Job.objects.get(kind="merge").priority == jobs.ASKED_FOR
    refused = ann[1].json("POST", "/api/v1/merges", recipe(start="no"))
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/start")


@pytest.mark.parametrize("door", AT_ONCE)
def test_what_is_known_beforehand_is_told_at_once_and_starts_nothing(merge, reader, door) -> None:
    assert ask(reader, door, merge).status_code == 200
    assert Job.objects.filter(kind="merge").count() == 0
    merge.refresh_from_db()
    assert merge.state == Merge.State.REGISTERED


def test_the_names_that_are_told_beforehand_are_those_that_come(merge, reader) -> None:
    before = reader.get(f"/api/models/{merge.full_name}/revision/main").json()
    assert [row["rfilename"] for row in before["siblings"]] == NAMES
    merges.touch(merge)
    compute(merge)
    after = reader.get(f"/api/models/{merge.full_name}/revision/main?blobs=true").json()
    assert (after["sha"], after["id"]) == (before["sha"], before["id"])
    assert [row["rfilename"] for row in after["siblings"]] == NAMES
    tree = reader.get(f"/api/models/ann/first/tree/{merge.commit}?recursive=true").json()
    assert {row["path"]: row["size"] for row in tree} == {row["rfilename"]: row["size"] for row in after["siblings"]}
    for door in [*DOORS, *AT_ONCE]:
        assert ask(reader, door, merge).status_code == 200, door
    assert Job.objects.filter(kind="merge").count() == 1


@pytest.mark.parametrize("door", DOORS)
def test_whoever_asks_for_a_file_starts_one_job_for_the_user_who_registered_it(merge, reader, ann, door) -> None:
    for _ in range(2):
        answer = ask(reader, door, merge)
        assert (answer.status_code, answer["Retry-After"]) == (503, "2")
        assert answer["X-Repo-Commit"] == merge.commit
        job = Job.objects.get(kind="merge")
        assert job.pk in answer["X-Error-Message"]
    assert (job.state, job.priority, job.requested_by) == ("queued", jobs.WAITED_FOR, ann[0])


@pytest.mark.parametrize(
    "path",
    [
        "/{name}/resolve/main/config.json",
        "/{name}/resolve/main/adapter_model.bin",
        "/{name}/resolve/main/a/README.md",
        "/ann/first/resolve/merge--{id}/tokenizer.json",
        "/api/models/{name}/tree/main/additional_chat_templates",
        "/api/models/ann/first/tree/merge--{id}/README",
    ],
)
def test_what_a_merge_will_never_hold_is_absent_at_once_and_starts_nothing(merge, reader, path) -> None:
    answer = reader.get(path.format(name=merge.full_name, id=merge.pk))
    assert (answer.status_code, answer["X-Error-Code"]) == (404, "EntryNotFound")
    assert answer["X-Repo-Commit"] == merge.commit
    assert Job.objects.filter(kind="merge").count() == 0


def test_a_merge_that_somebody_waits_for_goes_before_those_that_were_asked_for(ann, pair, reader) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    assert merge.jobs.get().priority == jobs.ASKED_FOR
    reader.head(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
    assert merge.jobs.get().priority == jobs.WAITED_FOR


def test_a_merge_that_failed_is_a_conflict_that_names_job_and_reason_until_it_is_asked_for_again(
    merge, reader, ann
) -> None:
    merges.touch(merge)
    config = File.objects.filter(revision__expert__name="first", path="adapter_config.json")
    whole = config.get().blob
    config.update(blob=File.objects.get(revision__expert__name="first", path=WEIGHTS).blob)  # no config any more
    assert compute(merge).state == Merge.State.FAILED
    config.update(blob=whole)
    job = merge.jobs.get()
    for door in DOORS:
        answer = ask(reader, door, merge)
        assert answer.status_code == 409
        assert "Retry-After" not in answer
        assert job.pk in answer["X-Error-Message"]
        assert job.error["detail"][:30] in answer["X-Error-Message"]
    assert merge.jobs.get().state == Job.State.FAILED
    assert ann[1].json("POST", "/api/v1/merges", recipe()).status_code == 202
    assert Merge.objects.get(pk=merge.pk).state == Merge.State.QUEUED
    assert merge.jobs.get().state == Job.State.QUEUED


def test_a_merge_that_was_cancelled_starts_again_when_it_is_read(merge, reader) -> None:
    jobs.cancel(merges.touch(merge))
    assert Merge.objects.get(pk=merge.pk).state == Merge.State.CANCELLED
    assert reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}").status_code == 503
    assert compute(merge).state == Merge.State.READY


def test_who_may_register_a_merge_may_stop_it_with_the_same_key(merge, ann) -> None:
    job = merges.touch(merge)
    rob = hf.person("rob", ["read", "write", "merge"])[1]
    assert rob.send("POST", f"/api/v1/jobs/{job.pk}/cancel").json()["code"] == "not-allowed"
    for scopes, status in ((["read", "write"], 403), (["read", "merge"], 200)):
        caller = hf.Caller(keys.create(user=ann[0], name="other", scopes=scopes)[1])
        assert caller.send("POST", f"/api/v1/jobs/{job.pk}/cancel").status_code == status
    assert Merge.objects.get(pk=merge.pk).state == Merge.State.CANCELLED


def test_the_limit_of_who_registered_a_merge_holds_for_those_who_touch_it(merge, ann, settings) -> None:
    other, _ = merges.register(user=ann[0], body=recipe(method="svd", parameters={}))
    settings.HUB_MERGE_MAX_QUEUED = 1
    caller = hf.person("rob", ["read", "merge"])[1]
    answer = caller.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
    assert (answer.status_code, answer["Retry-After"], answer.json()["code"]) == (429, "10", "rate-exceeded")
    assert merge.jobs.count() == 0
    # Rob has none of his own, so he may ask for it in his own name.
    assert caller.json("POST", "/api/v1/merges", recipe()).status_code == 202
    assert merge.jobs.get().requested_by.username == "rob"
    assert compute(other).state == Merge.State.READY


# Held requests


def test_two_requests_are_held_in_all_and_the_others_come_again_at_once(merge, reader, settings) -> None:
    settings.HUB_HOLD_SECONDS = 60
    for _ in range(waiting.MOST_HELD):
        assert waiting._places.acquire(blocking=False)
    try:
        started = time.monotonic()
        assert reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}").status_code == 503
        assert time.monotonic() - started < 5
    finally:
        waiting._places.release(waiting.MOST_HELD)
    settings.HUB_HOLD_SECONDS = 0
    for _ in range(waiting.MOST_HELD + 1):
        assert reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}").status_code == 503
    assert waiting._places.acquire(blocking=False)
    waiting._places.release()


@pytest.mark.django_db(transaction=True)
def test_a_request_is_held_until_the_merge_is_there_and_no_longer_than_the_parents_are_seen(
    merge, pair, ann, settings
) -> None:
    settings.HUB_HOLD_SECONDS = 60
    answers = {}

    def read(name: str, caller: hf.Caller) -> None:
        answers[name] = caller.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
        connection.close()

    callers = {"nobody": hf.Caller(), "owner": ann[1]}
    held = [threading.Thread(target=read, args=item) for item in callers.items()]
    for thread in held:
        thread.start()
    while waiting._places.acquire(blocking=False):  # until both are held
        waiting._places.release()
        time.sleep(0.01)
    experts.change_visibility(user=ann[0], expert=pair[1], visibility="private")
    compute(merge)
    for thread in held:
        thread.join()
    assert answers["owner"].status_code == 200
    assert answers["owner"].body == result(merge)[WEIGHTS]
    assert (answers["nobody"].status_code, answers["nobody"]["X-Error-Code"]) == (404, "RepoNotFound")


def together(count: int, work) -> list:
    """What `work` gave to this many threads that began at once."""
    start, got = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        try:
            got.append(work())
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == count
    return got


@pytest.mark.django_db(transaction=True)
def test_twenty_readers_at_once_start_one_job_and_one_message_is_sent(merge, queue) -> None:
    door = DOORS[0]
    answers = together(20, lambda: ask(hf.Caller(), door, merge))
    assert {answer.status_code for answer in answers} == {503}
    assert Job.objects.filter(kind="merge").count() == 1
    assert queue("heavy") == 1


@pytest.mark.django_db(transaction=True)
def test_twenty_who_register_a_recipe_at_once_get_one_merge_and_one_job(ann, pair, queue) -> None:
    got = together(20, lambda: merges.register(user=ann[0], body=recipe()))
    assert len({merge.pk for merge, _ in got}) == 1
    assert sum(is_new for _, is_new in got) == 1
    assert Merge.objects.count() == Job.objects.filter(kind="merge").count() == 1
    assert queue("heavy") == 1


@pytest.mark.django_db(transaction=True)
def test_a_touch_sends_a_job_that_was_only_asked_for_once_more_and_once_only(ann, pair, reader, queue) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    assert queue("heavy") == 1
    for _ in range(3):
        reader.head(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
    assert queue("heavy") == 2
    # The second message finds that the job is done.
    compute(merge)
    compute(merge)
    assert (merge.jobs.get().attempt, merge.jobs.get().state) == (1, "done")


@pytest.mark.django_db(transaction=True)
def test_a_merge_that_starts_again_is_sent_when_its_transaction_commits_and_not_before(merge, queue) -> None:
    jobs.cancel(merges.touch(merge))
    merge.refresh_from_db()
    before = queue("heavy")
    with transaction.atomic():
        merges.touch(merge)
        assert queue("heavy") == before
    assert queue("heavy") == before + 1


def test_a_reader_who_looked_before_the_merge_was_there_does_not_have_it_computed_again(merge) -> None:
    merges.touch(Merge.objects.get(pk=merge.pk))
    compute(Merge.objects.get(pk=merge.pk))
    assert merge.state == Merge.State.REGISTERED  # as this reader saw it
    assert merges.touch(merge).state == Job.State.DONE
    assert Merge.objects.get(pk=merge.pk).state == Merge.State.READY


# The first result decides


def test_the_weights_of_a_merge_that_nobody_reads_are_removed_and_come_back_the_same(merge, reader) -> None:
    merges.touch(merge)
    compute(merge)
    before, digest = result(merge), merge.result_digest
    head = reader.head(f"/{merge.full_name}/resolve/{merge.commit}/{WEIGHTS}")
    assert len(digest) == 64
    unread(merge, days=29)
    assert merges.collect() == 0
    unread(merge, days=31)
    assert cleaning.clean()["merges"] == 1
    merge.refresh_from_db()
    assert (merge.state, merge.result_digest) == (Merge.State.REGISTERED, digest)
    blob = Blob.objects.get(pk=tiny.sha256(before[WEIGHTS]))
    assert timezone.now() - blob.touched_at < timedelta(minutes=1)  # its grace time has just begun
    assert cleaning.collect_garbage(grace_seconds=0) == 1
    assert set(result(merge)) == set(NAMES) - {WEIGHTS}
    # What tells of it is still there, and nothing is computed for that.
    for name in set(NAMES) - {WEIGHTS}:
        assert reader.get(f"/{merge.full_name}/resolve/{merge.commit}/{name}").body == before[name]
        assert reader.get(f"/ann/first/resolve/{merge.commit}/{name}").body == before[name]
    assert merge.jobs.get().state == Job.State.DONE
    assert reader.get(f"/api/models/{merge.full_name}/tree/main").status_code == 503
    assert merge.jobs.get().state == Job.State.QUEUED
    # Whatever is told of a parent later, no byte behind the commit changes.
    Expert.objects.update(licence="mit")
    assert compute(merge).state == Merge.State.READY
    assert result(merge) == before
    again = reader.head(f"/{merge.full_name}/resolve/{merge.commit}/{WEIGHTS}")
    assert (again["ETag"], again["Content-Length"]) == (head["ETag"], head["Content-Length"])
    assert Revision.objects.filter(merge=merge).count() == 1


def test_a_merge_that_comes_out_differently_fails_with_both_digests_and_is_not_served(merge, reader) -> None:
    merges.touch(merge)
    compute(merge)
    computed, before = merge.result_digest, result(merge)
    # As if the first result had been made by other versions of the libraries.
    report = {**merge.report, "environment": {"numpy": "1.0"}}
    Merge.objects.filter(pk=merge.pk).update(result_digest="0" * 64, report=report)
    unread(merge, days=31)
    merges.collect()
    assert reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}").status_code == 503
    assert compute(merge).state == Merge.State.FAILED
    error = merge.jobs.get().error
    assert (error["code"], error["status"]) == ("merge-not-reproduced", 409)
    fault = error["errors"][0]
    assert (fault["wanted"]["digest"], fault["met"]["digest"]) == ("0" * 64, computed)
    assert fault["wanted"]["environment"] == {"numpy": "1.0"}
    answer = reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}")
    assert answer.status_code == 409
    assert computed in answer["X-Error-Message"]
    assert WEIGHTS not in result(merge)
    assert reader.get(f"/{merge.full_name}/resolve/main/README.md").body == before["README.md"]
    assert merge.report == report


def test_a_result_that_comes_after_its_job_was_closed_is_not_published(merge, ann) -> None:
    job = merges.touch(merge)
    lease = jobs.claim(job.pk)
    assert jobs.fail(lease, {"code": "time-exceeded", "detail": "Too long.", "errors": []})
    with pytest.raises(NotReady):
        merges.finish(merge=merge, staged={}, report={})
    assert not Revision.objects.filter(merge=merge).exists()


def test_a_job_that_is_carried_out_again_after_its_result_was_published_leaves_it_ready(merge, reader) -> None:
    merges.touch(merge)
    compute(merge)
    before = weights(reader, merge)
    # Its worker died between publishing and closing the job.
    merge.jobs.update(state=Job.State.RUNNING, lease_until=timezone.now() - timedelta(seconds=1))
    assert compute(merge).state == Merge.State.READY
    assert merge.jobs.get().state == Job.State.DONE
    assert weights(reader, merge) == before


def test_reading_is_noted_once_an_hour_and_keeps_the_weights(merge, reader) -> None:
    merges.touch(merge)
    compute(merge)
    assert Merge.objects.get(pk=merge.pk).read_at is None
    weights(reader, merge)
    first = Merge.objects.get(pk=merge.pk).read_at
    assert timezone.now() - first < timedelta(minutes=1)
    weights(reader, merge)
    assert Merge.objects.get(pk=merge.pk).read_at == first
    unread(merge, days=31)
    reader.head(f"/ann/second/resolve/{merge.commit}/{WEIGHTS}")
    assert merges.collect() == 0
    assert weights(reader, merge)


def test_a_file_of_a_merge_that_is_there_costs_one_query(merge, reader) -> None:
    merges.touch(merge)
    compute(merge)
    weights(reader, merge)
    most = {
        "/merges/{id}/resolve/main/{file}": 1,
        "/merges/{id}/resolve/{commit}/{file}": 1,
        "/ann/first/resolve/merge--{id}/{file}": 1,
        # By a commit alone nobody can tell that it is no revision of the expert.
        "/ann/second/resolve/{commit}/{file}": 6,
    }
    for method in ("GET", "HEAD"):
        for file in (WEIGHTS, "README.md"):
            for path, count in most.items():
                with CaptureQueriesContext(connection) as seen:
                    answer = reader.send(method, path.format(id=merge.pk, commit=merge.commit, file=file))
                assert answer.status_code == 200
                assert len(seen) <= count, [query["sql"] for query in seen]


# Limits of the work


def several(user, count: int) -> list[Job]:
    """The jobs of merges that differ in a weight."""
    found = []
    for number in range(count):
        body = recipe(experts=[{"expert": "ann/first", "weight": 1 + number}, {"expert": "ann/second", "weight": 0.5}])
        found.append(merges.register(user=user, body=body)[0].jobs.get())
    return found


@pytest.mark.django_db(transaction=True)
def test_merges_of_one_user_beyond_the_limit_wait_without_using_up_attempts_or_anybody_elses_turn(
    ann, pair, queue
) -> None:
    rob, _ = hf.person("rob", ["read", "merge"])
    first, second, third = several(ann[0], 3)
    other = merges.register(user=rob, body=recipe(method="svd", parameters={}))[0].jobs.get()
    leases = [jobs.claim(first.pk), jobs.claim(second.pk)]
    assert None not in leases
    for _ in range(9):
        assert jobs.claim(third.pk) is None
    third.refresh_from_db()
    assert (third.state, third.attempt) == ("queued", 0)
    assert third.message.startswith("Waits until one of 2 running merges")
    assert jobs.claim(other.pk) is not None
    before = queue("heavy")
    assert jobs.fail(leases[0], {"code": "x", "detail": "", "errors": []})
    # Whoever ends sends the next one of the same user.
    assert queue("heavy") == before + 1
    assert jobs.claim(third.pk) is not None
    third.refresh_from_db()
    assert (third.state, third.attempt, third.message) == ("running", 1, "")


@pytest.mark.django_db(transaction=True)
def test_of_many_workers_that_claim_merges_of_one_user_at_once_no_more_than_the_limit_get_one(ann, pair) -> None:
    waiting_jobs = iter(several(ann[0], 6))
    got = together(6, lambda: jobs.claim(next(waiting_jobs).pk))
    assert sum(lease is not None for lease in got) == 2
    assert Job.objects.filter(kind="merge", state="running").count() == 2


@pytest.mark.django_db(transaction=True)
def test_the_broker_gives_the_most_urgent_job_first(ann, pair, queue) -> None:
    asked, unwanted, awaited = several(ann[0], 3)
    Job.objects.filter(pk=unwanted.pk).update(priority=jobs.NOBODY_WAITS)
    with current_app.connection_for_read() as link:
        while queue("heavy"):
            link.SimpleQueue("heavy").get(block=False).ack()
        for job in (unwanted, asked):
            job.refresh_from_db()
            jobs.send(job.pk, job.kind, job.priority)
        jobs.hasten(awaited)
        got = []
        with link.Consumer(
            [Queue("heavy")],
            callbacks=[lambda body, message: (got.append(body[0][0]), message.ack())],
            prefetch_count=1,
        ):
            while len(got) < 3:
                link.drain_events(timeout=5)
    assert got == [awaited.pk, asked.pk, unwanted.pk]


def test_a_merge_that_takes_too_long_is_stopped_with_the_limit_and_the_remedy(merge, settings) -> None:
    settings.HUB_MERGE_MAX_SECONDS = 0
    merges.touch(merge)
    assert compute(merge).state == Merge.State.FAILED
    job = merge.jobs.get()
    assert (job.state, job.error["code"]) == ("failed", "time-exceeded")
    assert "0 seconds" in job.error["detail"]
    assert job.error["errors"][0]["remedy"]
    assert not Revision.objects.filter(merge=merge).exists()


@pytest.mark.django_db(transaction=True)
def test_a_job_that_does_not_stop_at_its_limit_is_closed_over_its_head(merge, monkeypatch) -> None:
    monkeypatch.setattr(runner, "STOP_SECONDS", 0)
    lease = jobs.claim(merges.touch(merge).pk)
    beat = threading.Thread(target=runner._beat, args=(runner.Work(lease, limit_seconds=0), threading.Event()))
    beat.start()
    beat.join(10)
    assert merge.jobs.get().error["code"] == "time-exceeded"
    merge.refresh_from_db()
    assert merge.state == Merge.State.FAILED


@pytest.mark.django_db(transaction=True)
def test_a_job_hears_within_a_second_that_it_is_to_stop_though_it_says_nothing(merge) -> None:
    lease = jobs.claim(merges.touch(merge).pk)
    work, over = runner.Work(lease), threading.Event()
    looked = []

    class Watch(threading.Thread):
        def run(self) -> None:
            runner._beat(work, over)
            looked.append(time.monotonic())

    beat = Watch()
    beat.start()
    jobs.cancel(merge.jobs.get())
    asked = time.monotonic()
    beat.join(10)
    assert work.is_stopped()
    assert looked[0] - asked < 1


def test_memory_beyond_the_limit_is_refused_as_a_typed_error_and_the_limit_ends_with_the_job() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with runner.memory_limit(2**30):
        assert np.empty(2**28, np.uint8).nbytes == 2**28
    with pytest.raises(MemoryExceeded) as met, runner.memory_limit(64 * 2**20):
        np.empty(2**31, np.uint8)
    assert met.value.faults[0].wanted == f"at most {64 * 2**20} bytes"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert np.empty(2**31, np.uint8).nbytes == 2**31
    with pytest.raises(RuntimeError, match="another"), runner.memory_limit(2**30):
        raise RuntimeError("another")


@pytest.mark.django_db(transaction=True)
def test_a_merge_is_computed_below_the_limit(merge) -> None:
    job, limits = merges.touch(merge), set()

    def work() -> None:
        runner.run(job.pk)
        connection.close()

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        limits.add(resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY)
        time.sleep(0.001)
    assert True in limits
    merge.refresh_from_db()
    assert merge.state == Merge.State.READY


# A hidden parent hides the merge, a yanked one marks it

READ_DOORS = [*DOORS, *AT_ONCE, ("GET", "/merges/{id}")]


def seen_by(caller: hf.Caller, merge: Merge, door: tuple[str, str]) -> tuple[int, str]:
    answer = ask(caller, door, merge)
    return answer.status_code, answer.get("X-Error-Code", "")


@pytest.mark.parametrize(
    "case", [("registered", "private", 1), ("ready", "private", 0), ("queued", "deleted", 0), ("ready", "deleted", 1)]
)
def test_a_hidden_parent_hides_the_merge_at_every_door_at_once(merge, pair, ann, case) -> None:
    state, how, which = case
    if state != "registered":
        merges.touch(merge)
    if state == "ready":
        compute(merge)
    if how == "private":
        experts.change_visibility(user=ann[0], expert=pair[which], visibility="private")
    else:
        experts.delete(user=factories.user("root", is_admin=True), expert=pair[which])
    count = Job.objects.filter(kind="merge").count()
    caller = hf.Caller() if how == "private" else ann[1]
    absent = Merge(id="0" * len(merge.pk), commit="0" * 39 + "1")
    for door in READ_DOORS:
        hidden = seen_by(caller, merge, door)
        assert hidden == seen_by(caller, absent, door), door
        assert hidden[0] == 404, door
    for path in ("/api/v1/merges", f"/api/v1/experts/{pair[1 - which].full_name}", f"/{pair[1 - which].full_name}"):
        assert merge.pk not in caller.get(path).body.decode()
    for job in merge.jobs.all():
        assert caller.get(f"/api/v1/jobs/{job.pk}").status_code == 404
    for file in File.objects.filter(revision__merge=merge):
        assert caller.get(f"/api/v1/by-hash/{file.blob_id}").status_code == 404
    assert Job.objects.filter(kind="merge").count() == count
    if how == "private":
        assert ann[1].get(f"/api/v1/merges/{merge.pk}").status_code == 200


def test_who_registered_a_merge_loses_it_with_the_parent(ann, pair) -> None:
    rob, caller = hf.person("rob", ["read", "merge", "write"])
    member = Membership.objects.create(
        namespace=Namespace.objects.get(name="ann"), user=rob, role=Membership.Role.READER
    )
    experts.change_visibility(user=ann[0], expert=pair[1], visibility="private")
    merge, _ = merges.register(user=rob, body=recipe())
    compute(merge)
    paths = [
        f"/api/v1/merges/{merge.pk}",
        f"/{merge.full_name}/resolve/main/{WEIGHTS}",
        f"/api/v1/jobs/{merge.jobs.get().pk}",
    ]
    assert [caller.get(path).status_code for path in paths] == [200] * 3
    member.delete()
    assert [caller.get(path).status_code for path in paths] == [404] * 3
    assert caller.send("POST", f"{paths[2]}/cancel").status_code == 404
    assert [ann[1].get(path).status_code for path in paths] == [200] * 3


def test_a_parent_that_was_yanked_marks_the_merge_and_leaves_it_readable(merge, pair, ann, reader) -> None:
    merges.touch(merge)
    compute(merge)
    doors = [
        "/merges/{id}/resolve/main/README.md",
        "/api/models/merges/{id}",
        "/ann/first/resolve/merge--{id}/README.md",
    ]
    assert not any("X-HF-Warning" in reader.get(path.format(id=merge.pk)) for path in doors)
    record = reader.get(f"/api/v1/merges/{merge.pk}").json()
    assert [parent["yanked"] for parent in record["parents"]] == [False, False]
    experts.yank(user=ann[0], expert=pair[1], yanked=True, reason="wrong labels")
    for path in doors:
        answer = reader.get(path.format(id=merge.pk))
        assert answer.status_code == 200
        assert answer["X-HF-Warning"] == "yanked; ann/second was yanked: wrong labels"
    record = reader.get(f"/api/v1/merges/{merge.pk}").json()
    assert {parent["expert"]: parent["yanked"] for parent in record["parents"]} == {
        "ann/first": False,
        "ann/second": True,
    }
    # A merge of it that is registered is computed still.
    unread(merge, days=31)
    merges.collect()
    assert reader.get(f"/{merge.full_name}/resolve/main/{WEIGHTS}").status_code == 503
    compute(merge)
    assert weights(reader, merge)
