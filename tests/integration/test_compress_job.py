"""The compressed form of an upload, made by the worker's own function and served by the API."""

import json

import numpy as np
import pytest
from safetensors.numpy import load

from registry import jobs, storage
from registry.models import BaseModel, Blob, Encoded, Job, Revision
from tests import factories, tiny
from tests.integration import hf
from workers import runner

pytestmark = pytest.mark.django_db

FILES = tiny.lora(seed=3, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))


@pytest.fixture
def made() -> Revision:
    owner = factories.user("ann")
    return factories.revision(owner, factories.expert(owner, "tea"), FILES)


def compress(revision: Revision) -> Job:
    Job.objects.filter(revision=revision, kind="check").update(state=Job.State.DONE)
    job = Job.objects.get(revision=revision, kind="compress")
    runner.run(job.pk)
    job.refresh_from_db()
    return job


def stored(encoded: Encoded) -> bytes:
    with storage.current().open(encoded.blob_id) as file:
        return file.read()


def test_a_fifth_of_the_values_is_kept_with_their_signs(made: Revision, tmp_path) -> None:
    from moerge.compression import decompress

    assert compress(made).state == Job.State.DONE
    encoded = Encoded.objects.get(revision=made)
    assert (encoded.preset, encoded.density) == ("default", 0.2)
    (tmp_path / "in.safetensors").write_bytes(stored(encoded))
    decompress(tmp_path / "in.safetensors", tmp_path / "out")
    before = load(FILES["adapter_model.safetensors"])
    after = load((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert set(after) == set(before)
    for name, values in before.items():
        kept = after[name] != 0
        assert kept.sum() == round(0.2 * values.size)
        assert (np.sign(after[name][kept]) == np.sign(values[kept])).all()
        assert np.abs(values[kept]).min() >= np.abs(values[~kept]).max()
        assert len(np.unique(np.abs(after[name][kept]))) == 1


def test_the_api_tells_its_size_digest_and_loss_and_serves_the_same_bytes(made: Revision) -> None:
    compress(made)
    encoded = Encoded.objects.get(revision=made)
    record = hf.Caller().get("/api/v1/experts/ann/tea").json()["compressed"]
    data = stored(encoded)
    values = 2 * 2 * 8 * 384
    assert (record["bytes"], record["original_bytes"]) == (len(data), 2 * values)
    assert (record["density"], record["recipe"], record["sha256"]) == (0.2, "default", tiny.sha256(data))
    assert 0.6 < record["cosine"] < 0.95
    answer = hf.Caller().head("/api/v1/experts/ann/tea/compressed")
    assert (answer.status_code, answer["Content-Length"]) == (200, str(len(data)))
    assert answer["ETag"] == f'"{encoded.blob_id}"'


def test_larger_bases_keep_fewer_values(made: Revision) -> None:
    BaseModel.objects.filter(name=tiny.BASE).update(parameter_count=20 * 10**9)
    compress(made)
    assert Encoded.objects.get(revision=made).density == 0.05


def test_a_second_run_gives_the_same_bytes_and_no_second_artefact(made: Revision) -> None:
    job = compress(made)
    first = Encoded.objects.get(revision=made)
    count = Blob.objects.count()
    Job.objects.filter(pk=job.pk).update(state=Job.State.QUEUED)
    runner.run(job.pk)
    assert Encoded.objects.get(revision=made).blob_id == first.blob_id
    assert Blob.objects.count() == count


def test_an_adapter_with_nothing_to_make_ternary_is_not_applicable_and_the_chain_goes_on() -> None:
    owner = factories.user("ann")
    made = factories.revision(owner, factories.expert(owner, "tiny"), tiny.lora(rank=1))
    job = compress(made)
    assert (job.state, Encoded.objects.count()) == (Job.State.NOT_APPLICABLE, 0)
    assert "large enough" in job.message
    assert jobs.claim(Job.objects.get(revision=made, kind="embed").pk) is not None


def test_a_worker_that_lost_the_job_writes_no_end(made: Revision) -> None:
    Job.objects.filter(revision=made, kind="check").update(state=Job.State.DONE)
    job = Job.objects.get(revision=made, kind="compress")
    lease = jobs.claim(job.pk)
    assert lease is not None
    assert jobs.finish(lease, result={"by": "the first"})
    runner.run(job.pk)  # a message that was delivered twice
    job.refresh_from_db()
    assert job.result == {"by": "the first"}
    assert Encoded.objects.count() == 0


def test_a_bug_fails_the_job_without_telling_its_insides(made: Revision, caplog) -> None:
    with storage.current().as_path(made.files.get(path="adapter_model.safetensors").blob_id) as path:
        path.unlink()
    job = compress(made)
    assert job.state == Job.State.FAILED
    assert job.error["code"] == "hub-error"
    assert "Traceback" not in json.dumps(job.error)
    made.refresh_from_db()
    assert made.state == Revision.State.FAILED
