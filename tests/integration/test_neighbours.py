"""Neighbours by weights: a copy is found under whatever factors, and told only to those who may see both."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from registry import jobs
from registry.models import BaseAlias, BaseModel, Blob, Fingerprint, Job, Neighbour, Revision
from registry.services import cleaning, experts
from tests import tiny
from tests.integration import hf
from tests.integration.weights import CONFIG, MODULES, WEIGHTS, delta, lora, measure, ready, refactored
from workers import runner

pytestmark = pytest.mark.django_db
FIRST = lora(1, rank=3, alpha=6)


@pytest.fixture
def ann():
    return hf.person("ann")


@pytest.fixture
def bob():
    return hf.person("bob")


def neighbours(caller: hf.Caller, name: str) -> list[dict]:
    answer = caller.get(f"/api/v1/experts/{name}/neighbours")
    assert answer.status_code == 200, answer.json()
    return answer.json()["by_weights"]


def record(caller: hf.Caller, name: str) -> dict:
    return caller.get(f"/api/v1/experts/{name}").json()


def test_a_copy_from_other_factors_of_another_rank_is_found(ann, bob) -> None:
    first = ready(ann[0], "tea", FIRST)
    copy = ready(bob[0], "mine", refactored(FIRST, rank=7))
    other = ready(bob[0], "other", lora(2, rank=3))
    measure(first, copy, other)
    (row,) = neighbours(bob[1], "bob/mine")
    assert row["expert"] == "ann/tea"
    assert row["revision"] == Revision.objects.get(expert=first).commit
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["ratio"] == pytest.approx(1, abs=1e-5)
    assert row["same"]
    assert [row["expert"] for row in neighbours(hf.Caller(), "ann/tea")] == ["bob/mine"]
    assert record(hf.Caller(), "bob/mine")["same_weights"] == ["ann/tea"]
    assert record(hf.Caller(), "bob/other")["same_weights"] == []


def test_cosine_and_ratio_are_those_of_the_whole_deltas_and_a_scaled_copy_is_not_the_same(ann, bob) -> None:
    near = mixed(FIRST, lora(2, rank=3, alpha=6), 0.8, 0.5)
    scaled = refactored(FIRST, rank=4, scale=2.0)
    made = [ready(ann[0], "tea", FIRST), ready(bob[0], "near", near), ready(bob[0], "scaled", scaled)]
    measure(*made)
    found = {row["expert"]: row for row in neighbours(ann[1], "ann/tea")}
    x, y = (np.concatenate([delta(tree, module).ravel() for module in MODULES]) for tree in (FIRST, near))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert 0.5 < cosine < 0.99
    assert found["bob/near"]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["bob/near"]["ratio"] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-4)
    assert not found["bob/near"]["same"]
    assert found["bob/scaled"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["bob/scaled"]["ratio"] == pytest.approx(0.5, rel=1e-4)
    assert not found["bob/scaled"]["same"]
    assert neighbours(bob[1], "bob/scaled")[0]["ratio"] == pytest.approx(2, rel=1e-4)
    assert list(found) == ["bob/scaled", "bob/near"]


def mixed(first: dict[str, bytes], second: dict[str, bytes], *shares: float) -> dict[str, bytes]:
    """The weighted sum of two adapters: their factors side by side."""
    config, tensors = json.loads(first[CONFIG]), [load(tree[WEIGHTS]) for tree in (first, second)]
    found = {}
    for module in MODULES:
        names = [f"base_model.model.{module}.lora_{one}.weight" for one in "AB"]
        found[names[0]] = np.concatenate([one[names[0]] for one in tensors])
        found[names[1]] = np.concatenate(
            [share * one[names[1]] for share, one in zip(shares, tensors, strict=True)], axis=1
        )
    scaling, rank = config["lora_alpha"] / config["r"], len(found[names[0]])
    config |= {"r": rank, "lora_alpha": scaling * rank}
    return {**first, CONFIG: json.dumps(config).encode(), WEIGHTS: save(found, metadata={"format": "pt"})}


def test_a_hidden_expert_is_nobodys_neighbour(ann, bob) -> None:
    hidden = ready(ann[0], "tea", FIRST, private=True)
    copy = ready(bob[0], "mine", refactored(FIRST, rank=5))
    measure(hidden, copy)
    assert Neighbour.objects.count() == 1
    for caller in (bob[1], hf.Caller(), hf.person("rob")[1]):
        answer = caller.get("/api/v1/experts/bob/mine/neighbours")
        assert b"ann" not in answer.body
        assert answer.json()["by_weights"] == []
        assert record(caller, "bob/mine")["same_weights"] == []
        assert caller.get("/api/v1/experts/ann/tea/neighbours").status_code == 404
    assert [row["expert"] for row in neighbours(ann[1], "bob/mine")] == ["ann/tea"]
    experts.change_visibility(user=ann[0], expert=hidden, visibility="public")
    assert [row["expert"] for row in neighbours(hf.Caller(), "bob/mine")] == ["ann/tea"]


def test_a_key_without_scope_read_sees_what_everybody_sees(ann) -> None:
    from registry.services import keys

    made = [ready(ann[0], "tea", FIRST, private=True), ready(ann[0], "copy", refactored(FIRST, rank=5))]
    measure(*made)
    blind = hf.Caller(keys.create(user=ann[0], name="blind", scopes=["write"])[1])
    assert neighbours(ann[1], "ann/copy")
    assert neighbours(blind, "ann/copy") == []
    assert record(blind, "ann/copy")["same_weights"] == []


def test_hidden_and_absent_are_answered_alike(ann, bob) -> None:
    ready(ann[0], "tea", FIRST, private=True)
    hidden = bob[1].get("/api/v1/experts/ann/tea/neighbours")
    absent = bob[1].get("/api/v1/experts/ann/tee/neighbours")
    assert hidden.status_code == absent.status_code == 404
    assert masked(hidden.json(), "tea") == masked(absent.json(), "tee")


def masked(body: dict, name: str) -> str:
    return json.dumps({**body, "request_id": ""}).replace(name, "NAME")


def test_yanked_and_deleted_experts_are_nobodys_neighbours(ann, bob) -> None:
    made = [ready(ann[0], "tea", FIRST), ready(bob[0], "mine", refactored(FIRST, rank=5))]
    measure(*made)
    experts.yank(user=ann[0], expert=made[0], yanked=True, reason="")
    assert neighbours(bob[1], "bob/mine") == []
    experts.yank(user=ann[0], expert=made[0], yanked=False, reason="")
    assert neighbours(bob[1], "bob/mine")
    experts.delete(user=ann[0], expert=made[0])
    assert neighbours(bob[1], "bob/mine") == []
    late = ready(bob[0], "late", FIRST)
    measure(late)
    assert [row["expert"] for row in neighbours(bob[1], "bob/late")] == ["bob/mine"]


def test_experts_of_another_base_are_never_neighbours(ann, bob) -> None:
    first = ready(ann[0], "tea", FIRST)
    other = BaseModel.objects.create(name="acme/other")
    BaseAlias.objects.create(key="acme/other", base=other)
    tree = refactored(FIRST, rank=5)
    tree[CONFIG] = json.dumps({**json.loads(tree[CONFIG]), "base_model_name_or_path": "acme/other"}).encode()
    tree["README.md"] = tiny.card(base_model="acme/other")
    stranger = ready(bob[0], "mine", tree)
    assert stranger.base_model == other
    measure(first, stranger)
    assert not Neighbour.objects.exists()
    # Nor where a row says otherwise, as after a base was named anew.
    rows = [Revision.objects.get(expert=one) for one in (first, stranger)]
    Neighbour.objects.create(first=rows[0], second=rows[1], cosine=1.0, ratio=1.0)
    assert neighbours(bob[1], "bob/mine") == neighbours(ann[1], "ann/tea") == []


def test_own_revisions_are_no_neighbours_and_other_experts_are_told_once(ann, bob) -> None:
    first = ready(ann[0], "tea", FIRST)
    measure(first)
    hf.put(ann[0], first, {**FIRST, "README.md": tiny.card("Sorts tea by its colour.")})
    measure(first)
    copy = ready(bob[0], "mine", refactored(FIRST, rank=5))
    measure(copy)
    hf.put(ann[0], first, {**FIRST, "README.md": tiny.card("Sorts tea by its leaf.")})
    measure(first)
    assert Fingerprint.objects.count() == 4
    (row,) = neighbours(ann[1], "bob/mine")
    head = Revision.objects.get(expert=first, refs__name="main")
    assert (row["expert"], row["revision"]) == ("ann/tea", head.commit)
    assert [row["expert"] for row in neighbours(ann[1], "ann/tea")] == ["bob/mine"]


def test_running_the_jobs_twice_changes_nothing(ann, bob) -> None:
    made = [ready(ann[0], "tea", FIRST), ready(bob[0], "mine", refactored(FIRST, rank=5))]
    measure(*made)
    before = (
        list(Neighbour.objects.values()),
        list(Fingerprint.objects.order_by("pk").values("sketch", "blob", "facts")),
    )
    Job.objects.filter(kind__in=["prototypes", "neighbours"]).update(state=Job.State.QUEUED)
    measure(*made)
    after = list(Neighbour.objects.values()), list(Fingerprint.objects.order_by("pk").values("sketch", "blob", "facts"))
    assert [bytes(row.pop("sketch")) for row in before[1]] == [bytes(row.pop("sketch")) for row in after[1]]
    assert before == after


def test_a_fingerprint_tells_norms_spectra_and_its_source(ann) -> None:
    first = ready(ann[0], "tea", FIRST)
    measure(first)
    row = Fingerprint.objects.get()
    assert row.source == tiny.sha256(FIRST[WEIGHTS])
    values = {module: np.linalg.svd(delta(FIRST, module), compute_uv=False) for module in MODULES}
    assert row.facts["norm"] == pytest.approx(np.sqrt(sum(np.sum(one**2) for one in values.values())), rel=1e-5)
    for module in MODULES:
        told = row.facts["modules"][module]
        assert told["norm"] == pytest.approx(np.linalg.norm(values[module]), rel=1e-5)
        assert told["share"] == pytest.approx(values[module][0] ** 2 / np.sum(values[module] ** 2), rel=1e-5)
    assert row.facts["scale"] == 2
    assert not row.facts["approximate"]


def test_fingerprints_do_not_decide_whether_a_revision_is_ready(ann) -> None:
    first = hf.expert(ann[0], "tea", FIRST)
    head = Revision.objects.get(expert=first)
    assert not Job.objects.filter(kind="prototypes").exists()
    runner.run(Job.objects.get(revision=head, kind="check").pk)
    job = Job.objects.get(revision=head, kind="prototypes")
    assert Job.objects.get(revision=head, kind="neighbours").after == job
    head.files.get(path=WEIGHTS).delete()
    runner.run(job.pk)
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    head.refresh_from_db()
    assert head.state == Revision.State.PROCESSING
    assert record(ann[1], "ann/tea")["jobs"][0]["kind"] == "check"
    assert not {row["kind"] for row in record(ann[1], "ann/tea")["jobs"]} & {"prototypes", "neighbours"}


def test_kinds_without_a_matrix_say_why_they_have_no_neighbours(ann) -> None:
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": tiny.BASE,
        "feedforward_modules": [],
        "target_modules": ["query"],
    }
    tensor = np.full((16, 1), 1.5, np.float32)
    tree = {
        "README.md": tiny.card(),
        CONFIG: json.dumps(config).encode(),
        WEIGHTS: save({f"base_model.model.{tiny.QUERY}.ia3_l": tensor}, metadata={"format": "pt"}),
    }
    made = ready(ann[0], "gains", tree)
    measure(made)
    answer = ann[1].get("/api/v1/experts/ann/gains/neighbours").json()
    assert (answer["state"], answer["by_weights"]) == ("none", [])
    assert "multiplies" in answer["reason"]
    assert Job.objects.get(kind="prototypes").state == Job.State.NOT_APPLICABLE


def test_the_state_tells_whether_the_weights_were_measured(ann) -> None:
    first = hf.expert(ann[0], "tea", FIRST)
    assert ann[1].get("/api/v1/experts/ann/tea/neighbours").json()["state"] == "pending"
    # Of before there were fingerprints.
    Revision.objects.update(state=Revision.State.READY)
    answer = ann[1].get("/api/v1/experts/ann/tea/neighbours").json()
    assert (answer["state"], answer["reason"]) == ("none", "The weights were not measured.")
    jobs.enqueue_fingerprint(Revision.objects.get(expert=first))
    assert ann[1].get("/api/v1/experts/ann/tea/neighbours").json()["state"] == "pending"
    measure(first)
    assert ann[1].get("/api/v1/experts/ann/tea/neighbours").json()["state"] == "ready"
    experts.create(user=ann[0], full_name="ann/empty", private=False)
    assert ann[1].get("/api/v1/experts/ann/empty/neighbours").status_code == 404


def test_the_sweep_of_blobs_spares_prototypes_and_takes_those_of_nobody(ann) -> None:
    first = ready(ann[0], "tea", FIRST)
    measure(first)
    blob = Fingerprint.objects.get().blob
    cleaning.collect_garbage(grace_seconds=-1)
    assert Blob.objects.filter(pk=blob.pk).exists()
    Fingerprint.objects.all().delete()
    cleaning.collect_garbage(grace_seconds=-1)
    assert not Blob.objects.filter(pk=blob.pk).exists()


def test_heads_older_than_fingerprints_are_measured_when_the_operator_says_so(ann) -> None:
    from django.core.management import call_command

    first = ready(ann[0], "tea", FIRST)
    call_command("fingerprint_experts")
    assert Job.objects.filter(kind="prototypes").exists()
    measure(first)
    call_command("fingerprint_experts")
    assert set(Job.objects.filter(kind__in=["prototypes", "neighbours"]).values_list("state", flat=True)) == {"done"}
    Fingerprint.objects.all().delete()
    call_command("fingerprint_experts")
    assert Job.objects.get(kind="prototypes").state == Job.State.QUEUED
    measure(first)
    assert Fingerprint.objects.exists()


def test_a_crowd_of_hidden_copies_keeps_no_public_one_from_being_found(ann, bob, monkeypatch) -> None:
    from registry.services import neighbours as service

    monkeypatch.setattr(service, "MEASURED", 2)
    crowd = [ready(ann[0], f"v{n}", {**FIRST, "README.md": tiny.card(f"Tea {n}.")}, private=True) for n in range(3)]
    public = ready(ann[0], "tea", mixed(FIRST, lora(2, rank=3, alpha=6), 0.8, 0.5))
    copy = ready(bob[0], "mine", refactored(FIRST, rank=5))
    measure(*crowd, public)
    measure(copy)
    assert [row["expert"] for row in neighbours(bob[1], "bob/mine")] == ["ann/tea"]


def test_the_page_shows_neighbours_and_warns_of_weights_that_are_somebody_elses(ann, bob) -> None:
    made = [ready(ann[0], "tea", FIRST), ready(bob[0], "mine", refactored(FIRST, rank=5))]
    measure(*made)
    page = hf.Caller().get("/bob/mine").body.decode()
    assert 'These weights do the same as those of <a href="/ann/tea">' in page
    assert "same weights</span>" in page
    assert 'hx-get="/bob/mine/neighbours?revision=' in page
    part = hf.Caller().get("/bob/mine/neighbours").body.decode()
    assert "ann/tea" in part
    assert "hx-get" not in part
    experts.change_visibility(user=ann[0], expert=made[0], visibility="private")
    for path in ("/bob/mine", "/bob/mine/neighbours"):
        assert b"ann/tea" not in hf.Caller().get(path).body
        assert b"do the same" not in hf.Caller().get(path).body
    assert hf.Caller().get("/ann/tea/neighbours").status_code == 404
