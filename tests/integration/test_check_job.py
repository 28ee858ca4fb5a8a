"""The check job: stored bytes are read back, figures of the card become evaluations."""

import pytest

from registry import jobs, storage
from registry.models import Evaluation, Job, Revision
from tests import factories, tiny
from workers import runner

pytestmark = pytest.mark.django_db

RESULTS = [
    {
        "name": "tea",
        "results": [
            {
                "dataset": {"name": "Teas"},
                "metrics": [
                    {"type": "accuracy", "name": "accuracy of the expert", "value": 0.75, "args": {"n": 200}},
                    {"type": "accuracy", "name": "accuracy of the untouched base", "value": 0.5},
                ],
            }
        ],
    }
]


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    monkeypatch.setattr(jobs, "send", lambda *_args, **_options: None)


def run(revision: Revision) -> Job:
    job = Job.objects.get(revision=revision, kind="check")
    lease = jobs.claim(job.pk)
    runner._carry_out(runner.Work(lease))
    job.refresh_from_db()
    return job


def test_sound_bytes_pass_and_the_next_job_may_start():
    made = factories.revision(factories.user())
    job = run(made)
    size = sum(row.blob.size_bytes for row in made.files.all())
    assert (job.state, job.progress) == ("done", 1.0)
    assert job.result == {"files": 3, "bytes": size, "tensors": 4}
    assert jobs.claim(Job.objects.get(revision=made, kind="compress").pk) is not None


def test_figures_of_the_card_become_evaluations_once():
    made = factories.revision(
        factories.user(), files=tiny.adapter(**{"README.md": tiny.card(**{"model-index": RESULTS})})
    )
    for _ in range(2):
        run(made)
        Job.objects.filter(revision=made).update(state="queued", attempt=0)
    row = Evaluation.objects.get()
    assert (row.revision, row.source, row.dataset, row.metric) == (made, "card", "Teas", "accuracy")
    assert (row.value, row.base_value, row.row_count) == (0.75, 0.5, 200)


def test_one_changed_bit_in_storage_fails_the_job_and_the_revision():
    made = factories.revision(factories.user())
    row = made.files.get(path="adapter_model.safetensors")
    place = storage.current().place(row.blob_id)
    place.chmod(0o600)
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    job = run(made)
    made.refresh_from_db()
    assert (job.state, made.state) == ("failed", "failed")
    assert job.error["errors"][0]["pointer"] == "/adapter_model.safetensors"
    assert job.error["errors"][0]["wanted"] == row.blob_id
    assert Job.objects.get(revision=made, kind="embed").state == "cancelled"


def test_bytes_that_are_away_put_the_job_off():
    made = factories.revision(factories.user())
    storage.current().delete(made.files.get(path="README.md").blob_id)
    job = run(made)
    assert (job.state, job.attempt) == ("queued", 0)
    assert "README.md" in job.message
