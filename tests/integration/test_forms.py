"""Compressed forms on request: who may have which made, how one waits for them, what a job may and may not change."""

import json

import pytest
from celery import current_app
from django.db import connection
from django.test.utils import CaptureQueriesContext

from registry import jobs, storage
from registry.checks.compression import Form
from registry.models import BaseModel, Encoded, Evaluation, Job, Membership, Namespace, Revision
from registry.services import blobs, cleaning, encodings
from tests import factories, tiny
from tests.integration import forms, hf
from tests.integration.merges import merge_of
from workers import runner

pytestmark = pytest.mark.django_db
TEA = "/api/v1/experts/ann/tea/compressed"
VALUES = 2 * 2 * 8 * 384


@pytest.fixture
def ann():
    return factories.user("ann")


@pytest.fixture
def made(ann) -> Revision:
    return forms.published(ann)


@pytest.fixture
def reader() -> hf.Caller:
    return hf.Caller()


def ask(caller: hf.Caller, query: str, path: str = TEA) -> Job:
    """Ask for a form that is not there; the job that the answer names."""
    answer = caller.get(f"{path}?{query}")
    assert answer.status_code == 503, answer.body
    return Job.objects.get(pk=answer.json()["job"])


def test_a_missing_form_is_made_by_the_job_that_the_503_names_and_then_served(made: Revision, reader) -> None:
    answer = reader.get(f"{TEA}?density=0.1")
    record = answer.json()
    assert (answer.status_code, record["code"], answer["Retry-After"]) == (503, "form-pending", "2")
    assert answer["Content-Type"] == "application/problem+json"
    assert record["job_url"] == f"/api/v1/jobs/{record['job']}"
    told = reader.get(record["job_url"])
    assert (told.status_code, told.json()["state"], told.json()["kind"]) == (200, "queued", "compress")
    assert forms.carried_out(record["job"]).state == Job.State.DONE
    answer = reader.get(f"{TEA}?density=0.1")
    assert answer.status_code == 200
    assert (answer["ETag"], answer["Content-Length"]) == (f'"{tiny.sha256(answer.body)}"', str(len(answer.body)))
    kept = [(values != 0).sum() for values in forms.decoded(answer.body).values()]
    assert kept == [round(0.1 * 8 * 384)] * 4
    part = reader.get(f"{TEA}?density=0.1", Range="bytes=5-11")
    assert (part.status_code, part.body) == (206, answer.body[5:12])
    assert reader.get(f"{TEA}?density=0.1", If_None_Match=answer["ETag"]).status_code == 304


def test_every_density_is_another_file_and_preset_and_density_are_kept_apart(made: Revision, ann) -> None:
    owner = hf.Caller(factories.key(ann))
    sizes = {}
    for density in ("0.05", "0.1", "0.3", "0.5"):
        forms.carried_out(ask(owner, f"density={density}").pk)
        sizes[density] = len(owner.get(f"{TEA}?density={density}").body)
    assert sorted(sizes.values()) == list(sizes.values())
    assert len(set(sizes.values())) == 4
    job = ask(owner, "density=0.1&preset=paper")
    assert (job.parameters["preset"], job.parameters["density"]) == ("paper", 0.1)
    forms.carried_out(job.pk)
    paper, ours = owner.get(f"{TEA}?density=0.1&preset=paper").body, owner.get(f"{TEA}?density=0.1").body
    assert forms.decoded(paper).keys() == forms.decoded(ours).keys()
    # One threshold for all: int(n * k) + 1 values; one for each: a tenth of each.
    assert sum((values != 0).sum() for values in forms.decoded(paper).values()) == int(VALUES * 0.1) + 1
    # Another preset does not stand in for the one that was asked for, whatever their densities.
    assert owner.head(f"{TEA}?density=0.1&preset=paper")["ETag"] != owner.head(f"{TEA}?density=0.1")["ETag"]


def test_without_a_density_the_form_of_the_revision_itself_is_served_and_named_it_is_the_same(
    made: Revision, reader
) -> None:
    own = Encoded.objects.get(revision=made)
    assert own.is_own
    forms.carried_out(ask(reader, "density=0.05").pk)
    assert reader.head(TEA)["ETag"] == f'"{own.blob_id}"'
    assert reader.head(f"{TEA}?density=0.2")["ETag"] == reader.head(f"{TEA}?preset=default")["ETag"]
    assert reader.head(f"{TEA}?density=0.2")["ETag"] == f'"{own.blob_id}"'
    record = reader.get("/api/v1/experts/ann/tea").json()
    assert (record["compressed"]["density"], record["compressed"]["sha256"]) == (0.2, own.blob_id)


def test_a_form_asked_for_before_the_own_one_is_there_does_not_become_it(ann, reader) -> None:
    made = factories.revision(ann, factories.expert(ann, "tea"), forms.FILES)
    forms.carried_out(ask(reader, "density=0.05").pk)
    answer = reader.get(TEA)
    assert (answer.status_code, answer.json()["job"]) == (503, Job.objects.get(key=f"compress:r{made.pk}").pk)
    assert reader.get("/api/v1/experts/ann/tea").json()["compressed"] is None
    forms.own(made)
    assert reader.get("/api/v1/experts/ann/tea").json()["compressed"]["density"] == 0.2
    assert Encoded.objects.filter(revision=made, is_own=True).count() == 1


def test_the_job_of_the_pipeline_is_waited_for_when_it_will_make_what_is_asked(ann, reader) -> None:
    made = factories.revision(ann, factories.expert(ann, "tea"), forms.FILES)
    assert ask(reader, "density=0.2").pk == ask(reader, "").pk == Job.objects.get(key=f"compress:r{made.pk}").pk
    assert Job.objects.filter(kind="compress").count() == 1
    assert ask(reader, "density=0.3").parameters["density"] == 0.3


def test_two_requests_for_one_form_meet_at_one_job_and_other_forms_have_their_own(made: Revision, reader, ann) -> None:
    owner = hf.Caller(factories.key(ann))
    first = ask(reader, "density=0.1")
    assert ask(owner, "density=0.10&preset=default").pk == first.pk
    assert ask(owner, f"density=0.1&revision={made.commit}").pk == first.pk
    assert ask(owner, "density=0.3").pk != first.pk
    assert ask(owner, "density=0.1&preset=hq").pk != first.pk
    assert Job.objects.filter(kind="compress", after=None).count() == 3


def test_each_revision_has_forms_of_its_own(made: Revision, ann, reader) -> None:
    forms.carried_out(ask(reader, "density=0.1").pk)
    old = reader.get(f"{TEA}?density=0.1").body
    other = tiny.lora(seed=4, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))
    newer = factories.revision(ann, made.expert, other)
    job = ask(reader, "density=0.1")
    assert job.revision == newer
    forms.carried_out(job.pk)
    assert reader.get(f"{TEA}?density=0.1").body != old
    assert reader.get(f"{TEA}?density=0.1&revision={made.commit}").body == old


@pytest.mark.parametrize("query", ["density=0.15", "density=0.1&preset=paper", "preset=int4", "preset=hq&density=0.2"])
def test_other_forms_need_scope_write_and_the_right_to_write_and_are_then_everybodys(
    made: Revision, ann, reader, query: str
) -> None:
    refused = reader.get(f"{TEA}?{query}")
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
    stranger = hf.Caller(factories.key(factories.user("rob")))
    refused = stranger.get(f"{TEA}?{query}")
    assert (refused.status_code, refused.json()["code"]) == (403, "not-allowed")
    refused = hf.Caller(factories.key(ann, "read")).get(f"{TEA}?{query}")
    assert (refused.status_code, refused.json()["code"]) == (403, "scope-missing")
    assert Job.objects.filter(after=None, kind="compress").count() == 0
    job = ask(hf.Caller(factories.key(ann)), query)
    # Whoever may see the expert may wait for it with them.
    assert ask(reader, query).pk == job.pk
    assert forms.carried_out(job.pk).state == Job.State.DONE, job.error
    assert reader.get(f"{TEA}?{query}").status_code == 200


@pytest.mark.parametrize(
    ("query", "pointer", "met"),
    [
        ("density=2", "?density", 2.0),
        ("density=0", "?density", 0.0),
        ("density=ten", "?density", "ten"),
        ("density=", "?density", ""),
        ("preset=zip", "?preset", "zip"),
        ("preset=int4&density=0.1", "?density", 0.1),
    ],
)
def test_nonsense_is_refused_with_met_and_wanted(made: Revision, reader, query: str, pointer: str, met) -> None:
    answer = reader.get(f"{TEA}?{query}")
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["met"]) == (pointer, met)
    assert fault["wanted"]
    assert Job.objects.filter(kind="compress", after=None).count() == 0


def test_forms_and_jobs_of_a_private_expert_are_hidden_as_if_absent(ann) -> None:
    forms.published(ann, "secret", private=True)
    path = "/api/v1/experts/ann/secret/compressed"
    owner, stranger = hf.Caller(factories.key(ann)), hf.Caller(factories.key(factories.user("rob")))
    for caller in (hf.Caller(), stranger, hf.Caller(factories.key(ann, "write"))):
        for query in ("", "?density=0.1", "?density=0.15", "?preset=int4"):
            answer = caller.get(f"{path}{query}")
            absent = caller.get(f"/api/v1/experts/ann/nothing/compressed{query}")
            assert answer.status_code == absent.status_code == 404
            assert {**answer.json(), "request_id": "", "detail": ""} == {
                **absent.json(), "request_id": "", "detail": "",
            }  # fmt: skip
    assert Job.objects.filter(after=None, kind="compress").count() == 0
    job = ask(owner, "density=0.1", path)
    assert owner.get(f"/api/v1/jobs/{job.pk}").status_code == 200
    assert stranger.get(f"/api/v1/jobs/{job.pk}").status_code == 404
    forms.carried_out(job.pk)
    answer = owner.get(f"{path}?density=0.1")
    assert (answer.status_code, answer["Cache-Control"]) == (200, "private, no-store")
    assert stranger.get(f"{path}?density=0.1").status_code == 404


def test_a_job_that_failed_is_told_with_its_reason_until_a_writer_tries_it_again(made: Revision, ann, reader) -> None:
    job = ask(reader, "density=0.1")
    file = made.files.get(path="adapter_model.safetensors")
    with storage.current().as_path(file.blob_id) as path:
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-8])
    assert forms.carried_out(job.pk).state == Job.State.FAILED
    for _ in range(2):
        answer = reader.get(f"{TEA}?density=0.1")
        assert (answer.status_code, answer.json()["code"], answer.json()["job"]) == (409, "form-failed", job.pk)
    reason = Job.objects.get(pk=job.pk).error["detail"]
    assert reason in answer.json()["detail"]
    assert "Retry-After" not in answer
    made.refresh_from_db()
    assert made.state == Revision.State.READY
    with storage.current().as_path(file.blob_id) as path:
        path.write_bytes(data)
    stranger = hf.Caller(factories.key(factories.user("rob")))
    assert stranger.send("POST", f"/api/v1/jobs/{job.pk}/retry").status_code == 403
    assert hf.Caller(factories.key(ann)).send("POST", f"/api/v1/jobs/{job.pk}/retry").status_code == 200
    made.refresh_from_db()
    assert made.state == Revision.State.READY  # another form being made is not the revision being processed
    assert ask(reader, "density=0.1").state == Job.State.QUEUED
    forms.carried_out(job.pk)
    assert reader.get(f"{TEA}?density=0.1").status_code == 200


def test_a_cancelled_job_starts_again_when_somebody_asks_again(made: Revision, reader) -> None:
    job = ask(reader, "density=0.1")
    jobs.cancel(job)
    again = ask(reader, "density=0.1")
    assert (again.pk, again.state) == (job.pk, Job.State.QUEUED)


def test_a_failed_pipeline_tells_why_there_is_no_form_of_its_own(ann, reader) -> None:
    made = factories.revision(ann, factories.expert(ann, "tea"), forms.FILES)
    lease = jobs.claim(Job.objects.get(revision=made, kind="check").pk)
    assert lease is not None
    jobs.fail(lease, {"detail": "The bytes changed."})
    answer = reader.get(TEA)
    assert (answer.status_code, answer.json()["code"]) == (409, "form-failed")
    assert "check did not pass" in answer.json()["detail"]
    assert Job.objects.get(key=f"compress:r{made.pk}").state == Job.State.CANCELLED


def test_an_adapter_without_anything_to_compress_has_no_form(ann, reader) -> None:
    made = factories.revision(ann, factories.expert(ann, "tiny"), tiny.lora(rank=1))
    forms.own(made)
    for query in ("", "?density=0.1"):
        path = f"/api/v1/experts/ann/tiny/compressed{query}"
        if query:
            forms.carried_out(ask(reader, "density=0.1", "/api/v1/experts/ann/tiny/compressed").pk)
        answer = reader.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "file-not-found")
        assert "large enough" in answer.json()["detail"]


def test_an_incomplete_revision_has_no_form_and_no_job(ann, reader) -> None:
    factories.revision(ann, factories.expert(ann, "empty"), {"README.md": tiny.card()})
    answer = reader.get("/api/v1/experts/ann/empty/compressed?density=0.1")
    assert (answer.status_code, answer.json()["code"]) == (404, "file-not-found")
    assert Job.objects.count() == 0


def test_jobs_of_other_forms_change_neither_state_nor_jobs_nor_compressed_of_the_expert(made: Revision, reader) -> None:
    before = reader.get("/api/v1/experts/ann/tea").json()
    job = ask(reader, "density=0.1")
    during = reader.get("/api/v1/experts/ann/tea").json()
    forms.carried_out(job.pk)
    after = reader.get("/api/v1/experts/ann/tea").json()
    for record in (during, after):
        assert {**record, "compressed_forms": []} == {**before, "compressed_forms": []}
    assert [job["kind"] for job in after["jobs"]] == ["check", "compress", "embed", "index"]
    assert [form["density"] for form in after["compressed_forms"]] == [0.1, 0.2]
    made.refresh_from_db()
    assert made.state == Revision.State.READY


def test_a_form_made_while_the_pipeline_runs_does_not_make_the_revision_ready(ann, reader) -> None:
    made = factories.revision(ann, factories.expert(ann, "tea"), forms.FILES)
    forms.carried_out(ask(reader, "density=0.1").pk)
    made.refresh_from_db()
    assert made.state == Revision.State.PROCESSING


def test_readers_together_and_each_user_have_so_many_forms_waiting(made: Revision, ann, reader, settings) -> None:
    settings.HUB_COMPRESS_MAX_QUEUED = 2
    first = ask(reader, "density=0.05")
    ask(reader, "density=0.1")
    refused = reader.get(f"{TEA}?density=0.3")
    assert (refused.status_code, refused.json()["code"], refused["Retry-After"]) == (429, "rate-exceeded", "10")
    assert ask(reader, "density=0.1").pk  # to wait for what is under way is not a new one
    owner = hf.Caller(factories.key(ann))
    ask(owner, "density=0.3")
    forms.carried_out(first.pk)
    ask(reader, "density=0.5")


def test_a_form_whose_row_was_removed_is_made_again_with_the_same_bytes(made: Revision, reader) -> None:
    job = ask(reader, "density=0.1")
    forms.carried_out(job.pk)
    first = {query: reader.get(f"{TEA}?{query}").body for query in ("density=0.1", "")}
    Encoded.objects.all().delete()
    # What its size would suggest today is not what was published.
    BaseModel.objects.filter(name=tiny.BASE).update(parameter_count=20 * 10**9)
    assert cleaning.collect_garbage(grace_seconds=0) == 2
    assert {digest for digest, _ in blobs.verify()} == set(made.files.values_list("blob", flat=True))
    assert all(damage == "" for _, damage in blobs.verify())
    assert ask(reader, "density=0.1").pk == job.pk
    forms.carried_out(job.pk)
    own = ask(reader, "")
    forms.carried_out(own.pk)
    assert {query: reader.get(f"{TEA}?{query}").body for query in first} == first
    assert Encoded.objects.get(is_own=True).density == 0.2
    made.refresh_from_db()
    assert made.state == Revision.State.READY


def test_forms_are_spared_by_the_sweep(made: Revision, reader) -> None:
    forms.carried_out(ask(reader, "density=0.1").pk)
    assert cleaning.collect_garbage(grace_seconds=0) == 0
    assert reader.get(f"{TEA}?density=0.1").status_code == 200


def test_the_record_tells_both_ratios_losses_and_the_address_of_each_form(made: Revision, ann, reader) -> None:
    forms.carried_out(ask(hf.Caller(factories.key(ann)), "density=0.1&preset=paper").pk)
    own, paper = reader.get("/api/v1/experts/ann/tea").json()["compressed_forms"]
    assert (own["preset"], own["scale_rule"], own["density"], own["is_default"]) == ("default", "unbiased", 0.2, True)
    assert (paper["preset"], paper["scale_rule"], paper["is_default"]) == ("paper", "sigma", False)
    original = made.files.get(path="adapter_model.safetensors").blob.size_bytes
    for form in (own, paper):
        answer = reader.get(form["url"].removeprefix("http://testserver"))
        assert (answer.status_code, len(answer.body)) == (200, form["bytes"])
        assert form["sha256"] == tiny.sha256(answer.body)
        assert form["original_bytes"] == 2 * VALUES
        assert form["ratio"] == pytest.approx(original / form["bytes"])
        # The matrices alone take less than the file that holds them.
        assert form["ternary_ratio"] > 2 * VALUES / form["bytes"]
        assert 0 < form["cosine"] < 1
    # Of random values no file takes less than their entropy, H(0.2) + 0.2 = 0.9219 of 16 bits.
    assert own["ternary_ratio"] < 16 / 0.9219
    # B is fifty times as small as A, so one threshold for both leaves nothing of it.
    assert 30 < paper["sigma_ratio"] < 80
    assert any("erased" in warning for warning in paper["warnings"])
    assert own["warnings"] == []
    page = reader.get("/ann/tea").body.decode()
    assert "erased" in page


def test_figures_of_forms_are_told_as_such(ann, reader) -> None:
    metrics = [
        {"type": "accuracy", "value": 0.9},
        {"type": "accuracy", "value": 0.875, "args": {"compression": {"preset": "default", "density": 0.2}}},
        {"type": "accuracy", "value": 0.75, "args": {"compression": {"preset": "default", "density": 0.1}}},
    ]
    index = [{"name": "tea", "results": [{"dataset": {"name": "Teas"}, "metrics": metrics}]}]
    made = forms.published(ann, files={**forms.FILES, "README.md": tiny.card(**{"model-index": index})})
    Job.objects.filter(key=f"check:r{made.pk}").update(state=Job.State.QUEUED)
    forms.carried_out(Job.objects.get(key=f"check:r{made.pk}").pk)
    assert list(Evaluation.objects.order_by("pk").values_list("value", "preset", "density")) == [
        (0.9, None, None), (0.875, "default", 0.2), (0.75, "default", 0.1),
    ]  # fmt: skip
    record = reader.get("/api/v1/experts/ann/tea").json()
    assert [(row["value"], row["preset"], row["density"]) for row in record["evaluations"]] == [
        (0.9, None, None), (0.875, "default", 0.2), (0.75, "default", 0.1),
    ]  # fmt: skip
    assert [form["accuracy"] for form in record["compressed_forms"]] == [0.875]
    forms.carried_out(ask(reader, "density=0.1").pk)
    forms.carried_out(ask(reader, "density=0.3").pk)
    record = reader.get("/api/v1/experts/ann/tea").json()
    assert [form["accuracy"] for form in record["compressed_forms"]] == [0.75, 0.875, None]


def upload(caller: hf.Caller, compression: object, *, name: str = "ann/tea", files=None) -> tuple[int, dict]:
    """Upload by REST with a choice of the compressed form: the status and the answer of the last step."""
    tree = forms.FILES if files is None else files
    claims = [{"path": path, "size": len(data), "sha256": tiny.sha256(data)} for path, data in tree.items()]
    body = {"expert": name, "files": claims, "compression": compression}
    started = caller.json("POST", "/api/v1/uploads", body)
    if started.status_code != 201:
        return started.status_code, started.json()
    for row in started.json()["files"]:
        if row["offset"] < row["size"]:
            assert (
                caller.send("PUT", row["url"].removeprefix("http://testserver"), data=tree[row["path"]]).status_code
                == 200
            )
    done = caller.json("POST", f"/api/v1/uploads/{started.json()['id']}/complete", {})
    return done.status_code, done.json()


def test_an_upload_chooses_preset_density_and_rule_of_its_form(ann) -> None:
    factories.bases.sync()
    caller = hf.Caller(factories.key(ann))
    choice = {"preset": "default", "density": 0.05, "scale_rule": "norm"}
    status, record = upload(caller, choice)
    assert status == 200, record
    made = Revision.objects.get(commit=record["revision"])
    assert Job.objects.get(key=f"compress:r{made.pk}").parameters == choice
    forms.own(made)
    encoded = Encoded.objects.get(revision=made)
    assert (encoded.preset, encoded.density, encoded.variant, encoded.is_own) == ("default", 0.05, "norm", True)
    assert encoded.report["scale_rule"] == "norm"
    told = hf.Caller().get("/api/v1/experts/ann/tea").json()
    assert (told["compressed"]["density"], told["compressed_forms"][0]["scale_rule"]) == (0.05, "norm")
    # The same density by the preset's own rule is another form.
    assert ask(hf.Caller(), "density=0.05").parameters.get("scale_rule") is None


def test_the_same_files_with_another_choice_are_another_revision(ann) -> None:
    factories.bases.sync()
    caller = hf.Caller(factories.key(ann))
    commits = [
        upload(caller, choice)[1]["revision"] for choice in ({"density": 0.05}, {"density": 0.05}, {"density": 0.5})
    ]
    assert commits[0] == commits[1] != commits[2]
    newest = Revision.objects.get(commit=commits[2])
    assert Job.objects.get(key=f"compress:r{newest.pk}").parameters["density"] == 0.5


@pytest.mark.parametrize(
    ("choice", "pointer"),
    [
        ({"density": 5}, "/compression/density"),
        ({"preset": "gzip"}, "/compression/preset"),
        ({"preset": "int4", "density": 0.5}, "/compression/density"),
        ({"speed": 1}, "/compression/speed"),
        ({"preset": "paper", "scale_rule": "norm"}, "/compression/scale_rule"),
    ],
)
def test_a_wrong_choice_is_refused_before_a_byte_is_sent(ann, choice, pointer: str) -> None:
    status, record = upload(hf.Caller(factories.key(ann)), choice)
    assert (status, record["errors"][0]["pointer"]) == (422, pointer)


def test_a_card_pushed_by_the_hub_protocol_chooses_its_form_and_a_wrong_one_is_refused(ann) -> None:
    hf.base()
    caller = hf.Caller(factories.key(ann))
    factories.expert(ann, "tea")

    def card(choice: dict) -> bytes:
        return tiny.card(moerge={"task": "Sorts teas.", "compression": choice})

    refused = caller.commit("ann/tea", [hf.header(), *hf.added({**forms.FILES, "README.md": card({"density": 7})})])
    assert refused.status_code == 422
    assert "density" in refused["X-Error-Message"]
    taken = caller.commit("ann/tea", [hf.header(), *hf.added({**forms.FILES, "README.md": card({"density": 0.5})})])
    assert taken.status_code == 200, taken.body
    assert Job.objects.get(kind="compress").parameters["density"] == 0.5


def test_a_base_that_grows_later_changes_neither_a_form_that_was_named_nor_its_address(made: Revision, reader) -> None:
    job = ask(reader, "density=0.1")
    BaseModel.objects.filter(name=tiny.BASE).update(parameter_count=20 * 10**9)
    forms.carried_out(job.pk)
    assert Encoded.objects.filter(revision=made, density=0.1).exists()
    assert reader.get(f"{TEA}?density=0.1").status_code == 200


def test_a_second_own_form_takes_the_place_of_the_first_and_both_stay(made: Revision) -> None:
    BaseModel.objects.filter(name=tiny.BASE).update(parameter_count=20 * 10**9)
    Job.objects.filter(key=f"compress:r{made.pk}").update(state=Job.State.QUEUED)
    forms.own(made)
    found = dict(Encoded.objects.filter(revision=made).values_list("density", "is_own"))
    assert found == {0.2: False, 0.05: True}


def test_a_merge_has_forms_at_the_standard_densities_and_no_other(ann) -> None:
    parents = [forms.published(ann, name).expert for name in ("one", "two")]
    merge = merge_of(parents, files=forms.FILES)
    path = f"/api/v1/experts/{merge.full_name}/compressed"
    job = ask(hf.Caller(), "density=0.1", path)
    assert forms.carried_out(job.pk).state == Job.State.DONE
    assert hf.Caller().get(f"{path}?density=0.1").status_code == 200
    assert hf.Caller(factories.key(ann)).get(f"{path}?density=0.15").status_code == 403
    forms.carried_out(ask(hf.Caller(), "", path).pk)
    assert hf.Caller().get(path).status_code == 200


def test_a_writer_of_the_namespace_may_have_other_forms_made(made: Revision) -> None:
    writer = factories.user("wendy")
    Membership.objects.create(user=writer, namespace=Namespace.objects.get(name="ann"), role=Membership.Role.WRITER)
    assert ask(hf.Caller(factories.key(writer)), "density=0.07").requested_by == writer


def test_the_list_of_forms_takes_no_query_for_each_of_them(made: Revision, ann, reader) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            assert reader.get("/api/v1/experts/ann/tea").status_code == 200
        return len(queries)

    before = count()
    for density in (0.05, 0.1, 0.3):
        forms.carried_out(ask(reader, f"density={density}").pk)
    assert count() == before


def test_progress_is_written_at_most_twice_a_second_and_a_new_word_at_once(made: Revision, reader, monkeypatch) -> None:
    job = ask(reader, "density=0.1")
    lease = jobs.claim(job.pk)
    assert lease is not None
    now = [100.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    work = runner.Work(lease)

    def told() -> tuple[float, str]:
        row = Job.objects.get(pk=job.pk)
        return row.progress, row.message

    seen = []
    for place in range(1, 41):
        now[0] = 100 + place * 0.1
        work.progress(place / 40, "Encoding")
        seen.append(told()[0])
    assert seen[0] == pytest.approx(1 / 40)
    # Nobody who looks waits more than a second for news, and four seconds write no more than nine times.
    assert 7 <= len(set(seen)) <= 9
    work.progress(0.99, "Storing")
    assert told() == (0.99, "Storing")
    jobs.cancel(job)
    with pytest.raises(runner.Stopped):
        work.progress(1.0, "Done")


@pytest.fixture
def queue():
    with current_app.connection_for_write() as link:
        client = link.default_channel.client
        client.delete("light", "heavy")
        yield lambda: [json.loads(message) for message in client.lrange("heavy", 0, -1)]
        client.delete("light", "heavy")


@pytest.mark.django_db(transaction=True)
def test_the_job_of_a_form_goes_to_the_heavy_queue_when_the_request_has_committed(ann, queue) -> None:
    made = forms.published(ann)
    job = ask(hf.Caller(), "density=0.1")
    (message,) = queue()
    assert (message["headers"]["task"], job.sent_at is not None) == ("workers.compress", True)
    assert job.pk in json.dumps(message["headers"])
    assert encodings.unfinished(made).keys() == {Form("default", 0.1)}
    jobs.cancel(job)
    ask(hf.Caller(), "density=0.1")
    assert [one["headers"]["task"] for one in queue()] == ["workers.compress"] * 2
    assert hf.Caller().get("/api/models/ann/tea/revision/compeft-k50").status_code == 200
    assert {one["headers"]["task"] for one in queue()} == {"workers.compress", "workers.reconstruct"}
