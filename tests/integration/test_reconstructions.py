"""`compeft-k10`: the compressed expert as ordinary files for clients that know nothing of compression."""

import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load

from api.hf import waiting
from registry import selectors
from registry.models import Encoded, File, Job, Ref, Revision
from registry.services import blobs, cleaning, reconstructions
from tests import factories, tiny
from tests.integration import forms, hf

pytestmark = pytest.mark.django_db
OTHER = tiny.lora(seed=4, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))
NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(autouse=True)
def no_holding(settings):
    settings.HUB_HOLD_SECONDS = 0


@pytest.fixture
def ann():
    return factories.user("ann")


@pytest.fixture
def made(ann) -> Revision:
    return forms.published(ann)


@pytest.fixture
def reader() -> hf.Caller:
    return hf.Caller()


def touched(reader: hf.Caller, form: str = "compeft-k10", name: str = "ann/tea") -> str:
    """The commit that a client is told at first touch."""
    answer = reader.get(f"/api/models/{name}/revision/{form}")
    assert answer.status_code == 200, answer.body
    return answer.json()["sha"]


def job_of(form: str = "compeft-k10") -> Job:
    return Job.objects.get(kind="reconstruct", parameters__form=form)


def weights(reader: hf.Caller, revision: str, name: str = "ann/tea") -> bytes:
    answer = reader.get(f"/{name}/resolve/{revision}/adapter_model.safetensors")
    assert answer.status_code == 200, answer.body
    return answer.body


def test_name_commit_and_file_names_are_told_at_once_and_the_weights_when_they_are_made(made, reader) -> None:
    answer = reader.get("/api/models/ann/tea/revision/compeft-k10")
    commit = answer.json()["sha"]
    assert len(commit) == 40
    assert commit != made.commit
    assert [row["rfilename"] for row in answer.json()["siblings"]] == NAMES
    job = job_of()
    for path in (
        f"/api/models/ann/tea/tree/{commit}?recursive=true",
        "/api/models/ann/tea/tree/compeft-k10",
        f"/ann/tea/resolve/{commit}/adapter_model.safetensors",
        "/ann/tea/resolve/compeft-k10/adapter_model.safetensors",
    ):
        answer = reader.get(path)
        assert (answer.status_code, answer["Retry-After"]) == (503, "2"), path
        assert job.pk in answer["X-Error-Message"]
    head = reader.head("/ann/tea/resolve/compeft-k10/adapter_model.safetensors")
    assert (head.status_code, head["X-Repo-Commit"]) == (503, commit)
    # All else is known already.
    answer = reader.get(f"/ann/tea/resolve/{commit}/adapter_config.json")
    assert (answer.status_code, answer["X-Repo-Commit"]) == (200, commit)
    assert answer.body == forms.FILES["adapter_config.json"]
    assert reader.get("/ann/tea/resolve/compeft-k10/nothing.json")["X-Error-Code"] == "EntryNotFound"
    assert Job.objects.filter(kind="reconstruct").count() == 1

    assert forms.carried_out(job.pk).state == Job.State.DONE
    answer = reader.get("/api/models/ann/tea/revision/compeft-k10?blobs=true")
    assert answer.json()["sha"] == commit == touched(reader)
    sizes = {row["rfilename"]: row["size"] for row in answer.json()["siblings"]}
    assert list(sizes) == NAMES
    for path in NAMES:
        head = reader.head(f"/ann/tea/resolve/compeft-k10/{path}")
        assert (head.status_code, head["X-Repo-Commit"]) == (200, commit)
        assert int(head["Content-Length"]) == sizes[path]
    fixed = reader.head(f"/ann/tea/resolve/{commit}/adapter_model.safetensors")
    assert fixed["Cache-Control"].endswith("immutable")
    assert fixed["X-Linked-Etag"] == f'"{tiny.sha256(weights(reader, commit))}"'
    tree = reader.get(f"/api/models/ann/tea/tree/{commit}?recursive=true&expand=true").json()
    assert {row["path"]: row["size"] for row in tree} == sizes
    changed = {row["path"]: row["lastCommit"]["id"] for row in tree}
    assert changed == {NAMES[0]: made.commit, NAMES[1]: made.commit, NAMES[2]: commit}


def test_the_weights_are_what_the_compressed_download_decodes_to(made, reader) -> None:
    for percent, density in ((5, 0.05), (10, 0.1), (20, 0.2), (30, 0.3), (50, 0.5)):
        form = f"compeft-k{percent}"
        touched(reader, form)
        forms.carried_out(job_of(form).pk)
        found = load(weights(reader, form))
        data = reader.get(f"/api/v1/experts/ann/tea/compressed?density={density}").body
        wanted = forms.decoded(data)
        assert found.keys() == wanted.keys() == load(forms.FILES["adapter_model.safetensors"]).keys()
        for name, values in wanted.items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], values), (form, name)
            assert (found[name] != 0).sum() == round(density * values.size)
    assert Encoded.objects.filter(revision=made).count() == 5
    assert Encoded.objects.get(revision=made, is_own=True).density == 0.2


def test_what_is_not_made_ternary_comes_bit_by_bit_as_it_was(ann, reader) -> None:
    arrays = load(forms.FILES["adapter_model.safetensors"])
    small = {"base_model.model.encoder.layer.0.attention.self.key.lora_A.weight": np.ones((2, 384), np.float32)}
    small |= {"base_model.model.encoder.layer.0.attention.self.key.lora_B.weight": np.eye(384, 2, dtype=np.float32) / 3}
    config = json.loads(forms.FILES["adapter_config.json"])
    config |= {"target_modules": ["query", "value", "key"], "rank_pattern": {"key": 2}}
    files = {
        **forms.FILES,
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": tiny.dump({**arrays, **small}),
    }
    forms.published(ann, files=files)
    touched(reader)
    forms.carried_out(job_of().pk)
    found = load(weights(reader, "compeft-k10"))
    for name, values in small.items():
        assert found[name].tobytes() == values.tobytes()


def test_when_the_head_moves_the_name_follows_and_the_old_commit_keeps_its_bytes(made, ann, reader) -> None:
    old = touched(reader)
    forms.carried_out(job_of().pk)
    before = weights(reader, old)
    newer = factories.revision(ann, made.expert, OTHER)
    new = touched(reader)
    assert new != old
    assert reader.get("/ann/tea/resolve/compeft-k10/adapter_model.safetensors").status_code == 503
    assert weights(reader, old) == before
    job = Job.objects.get(kind="reconstruct", revision=newer)
    forms.carried_out(job.pk)
    assert weights(reader, "compeft-k10") == weights(reader, new) != before
    assert weights(reader, old) == before


def test_a_commit_that_was_told_before_the_head_moved_is_still_made(made, ann, reader) -> None:
    old = touched(reader)
    factories.revision(ann, made.expert, OTHER)
    assert reader.get(f"/ann/tea/resolve/{old}/adapter_model.safetensors").status_code == 503
    forms.carried_out(job_of().pk)
    found = load(weights(reader, old))
    before = load(forms.FILES["adapter_model.safetensors"])
    for name, values in found.items():
        kept = values != 0
        assert (np.sign(values[kept]) == np.sign(before[name][kept])).all()


def test_a_reconstruction_stands_beside_the_history_and_moves_nothing(made, ann, reader) -> None:
    before = reader.get("/api/v1/experts/ann/tea").json()
    commit = touched(reader)
    forms.carried_out(job_of().pk)
    after = reader.get("/api/v1/experts/ann/tea").json()
    assert {**after, "compressed_forms": [], "downloads": 0} == {**before, "compressed_forms": [], "downloads": 0}
    listed = reader.get("/api/v1/experts/ann/tea/revisions").json()["items"]
    assert [row["revision"] for row in listed] == [made.commit]
    assert [row["id"] for row in reader.get("/api/models/ann/tea/commits/main").json()] == [made.commit]
    refs = reader.get("/api/models/ann/tea/refs").json()
    assert [(ref["name"], ref["targetCommit"]) for ref in refs["branches"]] == [("main", made.commit)]
    assert refs["tags"] == []
    assert commit[:12] not in reader.get("/ann/tea").body.decode()
    assert reader.get("/api/models/ann/tea").json()["sha"] == made.commit
    assert list(selectors.routable()) == [made]
    assert Ref.objects.get(expert=made.expert).revision == made
    # By its commit it is found like any other.
    assert reader.get(f"/api/v1/experts/ann/tea/revisions/{commit}").json()["state"] == "ready"
    page = reader.get(f"/ann/tea/tree/{commit}").body.decode()
    assert f"/ann/tea/tree/{made.commit}" in page
    assert "Make it" not in page
    assert reader.get("/ann/tea/tree/compeft-k10")["Location"] == "/ann/tea#compressed"
    assert reader.get("/ann/nothing/tree/compeft-k10").status_code == 404
    assert [row["id"] for row in reader.get(f"/api/models/ann/tea/commits/{commit}").json()] == [commit, made.commit]


def test_no_branch_and_no_tag_can_be_made_of_a_reconstruction(made, ann, reader) -> None:
    commit = touched(reader)
    owner = hf.Caller(factories.key(ann))
    for _ in range(2):
        for start in ("compeft-k10", commit):
            answer = owner.json("POST", "/api/models/ann/tea/branch/dev", {"startingPoint": start})
            assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")
            assert owner.json("POST", f"/api/models/ann/tea/tag/{start}", {"tag": "v1"}).status_code == 404
        forms.carried_out(job_of().pk)
    assert owner.json("POST", "/api/models/ann/tea/branch/compeft-k10", {}).status_code == 422
    assert Ref.objects.count() == 1


def test_another_density_than_the_five_is_no_revision(made, reader) -> None:
    for name in ("compeft-k15", "compeft-k010", "compeft-k100", "compeft-", "COMPEFT-K10"):
        answer = reader.get(f"/api/models/ann/tea/revision/{name}")
        assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound"), name
    assert Job.objects.filter(kind="reconstruct").count() == 0


def test_an_empty_or_incomplete_expert_has_no_reconstruction(ann, reader) -> None:
    factories.expert(ann, "empty")
    factories.revision(ann, factories.expert(ann, "half"), {"README.md": tiny.card()})
    for name in ("empty", "half"):
        answer = reader.get(f"/api/models/ann/{name}/revision/compeft-k10")
        assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")
    assert Job.objects.filter(kind="reconstruct").count() == 0


def test_an_adapter_with_nothing_to_compress_is_told_so(ann, reader) -> None:
    factories.revision(ann, factories.expert(ann, "tiny"), tiny.lora(rank=1))
    commit = touched(reader, name="ann/tiny")
    assert forms.carried_out(job_of().pk).state == Job.State.NOT_APPLICABLE
    for name in ("compeft-k10", commit):
        answer = reader.get(f"/ann/tiny/resolve/{name}/adapter_model.safetensors")
        assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")


def test_a_reconstruction_that_failed_is_a_refusal_and_no_endless_wait(made, ann, reader) -> None:
    commit = touched(reader)
    job = job_of()
    Job.objects.filter(pk=job.pk).update(state=Job.State.FAILED, error={"detail": "The disk is full."})
    for path in (f"/ann/tea/resolve/{commit}/adapter_model.safetensors", "/api/models/ann/tea/revision/compeft-k10"):
        answer = reader.get(path)
        assert (answer.status_code, answer.json()["code"]) == (409, "form-failed")
        assert "The disk is full." in answer["X-Error-Message"]
    made.refresh_from_db()
    assert made.state == Revision.State.READY
    assert hf.Caller(factories.key(ann)).send("POST", f"/api/v1/jobs/{job.pk}/retry").status_code == 200
    forms.carried_out(job.pk)
    assert weights(reader, commit)


def test_private_reconstructions_are_as_absent_as_the_expert(ann) -> None:
    made = forms.published(ann, "secret", private=True)
    owner, stranger = hf.Caller(factories.key(ann)), hf.Caller(factories.key(factories.user("rob")))
    commit = reconstructions.commit_of(made, "compeft-k10")

    def paths(name: str) -> list[str]:
        places = [f"/api/models/{name}/revision/{at}" for at in ("compeft-k10", commit)]
        places += [f"/{name}/resolve/{at}/{file}" for at in ("compeft-k10", commit) for file in NAMES]
        return [*places, f"/api/models/{name}/tree/compeft-k10"]

    def check_hidden() -> None:
        for caller in (hf.Caller(), stranger, hf.Caller(factories.key(ann, "write"))):
            for hidden, absent in zip(paths("ann/secret"), paths("ann/nothin"), strict=True):
                met, wanted = caller.get(hidden), caller.get(absent)
                assert met.status_code == wanted.status_code == 404
                assert {**met.json(), "request_id": ""} == {**wanted.json(), "request_id": ""}

    check_hidden()
    assert Job.objects.filter(kind="reconstruct").count() == 0
    assert touched(owner, name="ann/secret") == commit
    check_hidden()
    forms.carried_out(job_of().pk)
    check_hidden()
    answer = owner.get(f"/ann/secret/resolve/{commit}/adapter_model.safetensors")
    assert (answer.status_code, answer["Cache-Control"]) == (200, "private, no-store")
    digest = tiny.sha256(answer.body)
    assert owner.get(f"/api/v1/by-hash/{digest}").status_code == 200
    assert stranger.get(f"/api/v1/by-hash/{digest}").status_code == 404


def test_a_commit_is_found_on_its_own_expert_alone(made, ann, reader) -> None:
    forms.published(ann, "coffee")
    commit = touched(reader)
    for _ in range(2):
        answer = reader.get(f"/ann/coffee/resolve/{commit}/adapter_model.safetensors")
        assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")
        forms.carried_out(job_of().pk)
    assert touched(reader, name="ann/coffee") != commit


def test_reconstructions_are_the_same_bytes_when_they_are_made_again_and_are_swept_with_their_rows(
    made, reader
) -> None:
    commit = touched(reader)
    forms.carried_out(job_of().pk)
    first = weights(reader, commit)
    row = Revision.objects.get(commit=commit)
    own = set(File.objects.filter(revision=made).values_list("blob", flat=True))
    assert cleaning.collect_garbage(grace_seconds=0) == 0
    row.delete()
    Encoded.objects.filter(is_own=False).delete()
    assert cleaning.collect_garbage(grace_seconds=0) == 2
    assert {digest for digest, _ in blobs.verify()} == own | {Encoded.objects.get().blob_id}
    assert reader.get(f"/ann/tea/resolve/{commit}/adapter_model.safetensors").status_code == 503
    forms.carried_out(job_of().pk)
    assert weights(reader, commit) == weights(reader, "compeft-k10") == first


def test_running_the_job_twice_makes_one_revision_and_leaves_nothing_in_staging(made, reader, settings) -> None:
    touched(reader)
    job = job_of()
    forms.carried_out(job.pk)
    Job.objects.filter(pk=job.pk).update(state=Job.State.QUEUED)
    assert forms.carried_out(job.pk).state == Job.State.DONE
    assert Revision.objects.filter(derived_from=made).count() == 1
    assert list(settings.HUB_STAGING_DIR.iterdir()) == []


def test_what_readers_had_made_does_not_fill_the_owners_quota(made, ann, reader, settings) -> None:
    touched(reader, "compeft-k50")
    forms.carried_out(job_of("compeft-k50").pk)
    held = sum(file.blob.size_bytes for file in made.files.all())
    settings.HUB_NAMESPACE_MAX_BYTES = held + 200
    factories.revision(ann, made.expert, {"notes.md": b"x" * 150})


def test_a_reconstruction_may_be_merged_by_its_commit_and_not_by_its_name(made, ann, reader) -> None:
    from django.core.management import call_command

    call_command("sync_catalogue", verbosity=0)
    commit = touched(reader)
    forms.carried_out(job_of().pk)
    other = forms.published(ann, "coffee", files=OTHER)
    caller = hf.Caller(factories.key(ann))

    def merged(revision: str) -> int:
        experts = [{"expert": "ann/tea", "revision": revision, "weight": 0.5}, {"expert": "ann/coffee", "weight": 0.5}]
        body = {"base_model": tiny.BASE, "method": "linear", "parameters": {}, "experts": experts}
        return caller.json("POST", "/api/v1/merges/check", body).status_code

    assert other.state == Revision.State.READY
    assert merged(commit) == 200
    assert merged("compeft-k10") == 404


def test_readers_without_an_account_wait_for_so_many_at_a_time(made, ann, reader, settings) -> None:
    settings.HUB_COMPRESS_MAX_QUEUED = 1
    touched(reader, "compeft-k5")
    answer = reader.get("/api/models/ann/tea/revision/compeft-k30")
    assert (answer.status_code, answer["Retry-After"]) == (429, "10")
    touched(reader, "compeft-k5")
    touched(hf.Caller(factories.key(ann)), "compeft-k30")


@pytest.mark.django_db(transaction=True)
def test_a_request_is_held_until_the_weights_are_there(ann, settings) -> None:
    from django.db import connection

    forms.published(ann)
    commit = touched(hf.Caller())
    settings.HUB_HOLD_SECONDS = 60

    def work() -> None:
        forms.carried_out(job_of().pk)
        connection.close()

    worker = threading.Timer(0.5, work)
    worker.start()
    answer = hf.Caller().get(f"/ann/tea/resolve/{commit}/adapter_model.safetensors")
    worker.join()
    assert answer.status_code == 200
    assert load(answer.body)


def test_two_requests_are_held_at_a_time_and_the_third_is_told_to_come_again(made, reader, settings) -> None:
    settings.HUB_HOLD_SECONDS = 60
    commit = touched(reader)
    places = [waiting._places.acquire(blocking=False) for _ in range(waiting.MOST_HELD)]
    try:
        assert places == [True, True]
        answer = reader.get(f"/ann/tea/resolve/{commit}/adapter_model.safetensors")
        assert answer.status_code == 503
    finally:
        waiting._places.release(waiting.MOST_HELD)
    settings.HUB_HOLD_SECONDS = 0
    for _ in range(waiting.MOST_HELD + 1):  # a place that was held is given back
        assert reader.get(f"/ann/tea/resolve/{commit}/adapter_model.safetensors").status_code == 503
    assert waiting._places.acquire(blocking=False)
    waiting._places.release()


def test_nothing_is_uploaded_to_a_reconstruction(made, ann) -> None:
    owner = hf.Caller(factories.key(ann))
    answer = owner.json("POST", "/api/models/ann/tea/preupload/compeft-k10", {"files": []})
    assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")
    answer = owner.commit("ann/tea", [hf.header(), *hf.added({"a.txt": b"a"})], branch="compeft-k10")
    assert (answer.status_code, answer["X-Error-Code"]) == (404, "RevisionNotFound")
    assert Job.objects.filter(kind="reconstruct").count() == 0
