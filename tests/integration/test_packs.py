"""Packs over HTTP: the same bytes for the same experts, of one base, and of nobody whom the caller may not see."""

import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from moerge.routing import packs as reading
from registry.models import BaseAlias, BaseModel, Embedding, Encoder, Expert, Fingerprint, Job, Revision
from registry.services import experts
from tests import tiny
from tests.integration import hf
from tests.integration.weights import CONFIG, GATES, MODULES, SIZE, WEIGHTS, delta, gates, lora, measure, ready
from workers import runner

pytestmark = pytest.mark.django_db

URL = "/api/v1/routing/packs"
TEA, COFFEE = lora(1, rank=3, alpha=6), {**lora(2, rank=2, alpha=6), GATES: gates(2)}


@pytest.fixture
def ann():
    return hf.person("ann")


@pytest.fixture
def two(ann):
    """An expert without gates and one with."""
    made = [ready(ann[0], "tea", TEA), ready(ann[0], "coffee", COFFEE)]
    measure(*made)
    return made


def asked(caller: hf.Caller, *names: str, headers: dict[str, str] | None = None, **more):
    body = {"base_model": tiny.BASE, "experts": list(names), **more}
    return caller.send("POST", URL, data=json.dumps(body), kind="application/json", **(headers or {}))


def commit(expert: Expert) -> str:
    return Revision.objects.get(expert=expert, refs__name="main").commit


def test_a_pack_holds_the_prototypes_of_the_weights_in_the_order_asked_for(two) -> None:
    answer = asked(hf.Caller(), "ann/coffee", "ann/tea")
    assert answer.status_code == 200, answer.body
    tensors = load(answer.body)
    assert set(tensors) == {f"{kind}/{module}" for kind in ("arrow", "arrow_sigma", "mask/arrow") for module in MODULES}
    for module in MODULES:
        assert tensors[f"arrow/{module}"].dtype == np.float16
        for row, tree in enumerate((COFFEE, TEA)):
            _, values, right = np.linalg.svd(delta(tree, module))
            vector = tensors[f"arrow/{module}"][row].astype(np.float64)
            assert abs(vector @ right[0]) > 0.9999 * np.linalg.norm(vector)
            assert vector[np.argmax(np.abs(vector))] > 0
            assert tensors[f"arrow_sigma/{module}"][row] == pytest.approx(values[0], rel=1e-5)
        assert tensors[f"mask/arrow/{module}"].tolist() == [1, 1]


def test_the_metadata_names_every_expert_with_its_revision_and_digest(two, tmp_path) -> None:
    BaseModel.objects.filter(name=tiny.BASE).update(revision="abc123")
    path = tmp_path / "pack"
    path.write_bytes(asked(hf.Caller(), "ann/tea", "ann/coffee").body)
    with safe_open(path, framework="np") as file:
        said = file.metadata()
    assert (said["base_model"], said["base_revision"], said["format"]) == (tiny.BASE, "abc123", "moerge-pack/1")
    first, second = json.loads(said["experts"])
    assert first == {
        "expert": "ann/tea", "revision": commit(two[0]), "sha256": tiny.sha256(TEA[WEIGHTS]), "rank": 3, "scale": 2.0,
        "target_modules": ["query", "value"], "is_approximate": False,
    }  # fmt: skip
    assert (second["rank"], second["scale"]) == (2, 3.0)
    # Two of two are a majority of none: the first counts as the rule, the other is flagged.
    assert json.loads(said["differing"]) == ["ann/coffee"]
    assert int(said["top_k"]) == 2
    assert float(said["temperature"]) == 1
    assert float(said["alpha"]) > 0


def test_experts_without_gates_are_masked_for_phatgoose(two) -> None:
    pack = reading.read(asked(hf.Caller(), "ann/tea", "ann/coffee", kinds=["phatgoose", "arrow"]).body)
    assert pack.kinds == ("arrow", "phatgoose")
    for module in MODULES:
        assert pack.masks["phatgoose"][module].tolist() == [False, True]
        np.testing.assert_array_equal(pack.phatgoose[module][1], load(gates(2))[module])
        assert pack.masks["arrow"][module].tolist() == [True, True]
    refused = asked(hf.Caller(), "ann/tea", kinds=["phatgoose"])
    assert refused.status_code == 400
    assert refused.json()["code"] == "pack-refused"
    assert "gates" in refused.json()["errors"][0]["met"]


def test_the_global_half_of_glider_is_the_stored_embedding(two) -> None:
    Encoder.objects.all().delete()
    Encoder.objects.create(id="enc", dimension=4, max_tokens=8, state=Encoder.State.ACTIVE)
    assert asked(hf.Caller(), "ann/tea", kinds=["glider_global"]).status_code == 400
    rows = {
        ("description", "enc"): [1, 0, 0, 0],
        ("description", "old"): [0, 0, 0, 1],
        ("instruction", "enc"): [0, 1, 0, 0],
        ("centroid", "enc"): [0, 0, 1, 0],
    }
    for (kind, encoder), vector in rows.items():
        put_embedding(two[0], kind, encoder, vector)
    put_embedding(two[1], "description", "old", [0, 0, 0, 1])
    answer = asked(hf.Caller(), "ann/tea", "ann/coffee", kinds=["glider_global"])
    pack = reading.read(answer.body)
    assert pack.encoder == "enc"
    assert pack.glider_global.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert pack.glider_mask.tolist() == [True, False]
    Embedding.objects.filter(kind="instruction").delete()
    without = asked(hf.Caller(), "ann/tea", "ann/coffee", kinds=["glider_global"])
    assert reading.read(without.body).glider_global[0].tolist() == [1, 0, 0, 0]
    assert without.headers["ETag"] != answer.headers["ETag"]


def put_embedding(expert: Expert, kind: str, encoder: str, vector: list[int]) -> None:
    Embedding.objects.create(
        revision=Revision.objects.get(expert=expert), kind=kind, encoder=encoder, text_digest="",
        vector=np.array(vector, "<f2").tobytes(),
    )  # fmt: skip


def test_the_same_question_gives_the_same_bytes_and_etag_and_304(two) -> None:
    first, again = (asked(hf.Caller(), "ann/tea", "ann/coffee", kinds=["arrow", "phatgoose"]) for _ in "ab")
    assert first.body == again.body
    etag = first.headers["ETag"]
    assert etag == again.headers["ETag"]
    pinned = asked(hf.Caller(), f"ann/tea@{commit(two[0])}", "ANN/coffee@main", kinds=["phatgoose", "arrow", "arrow"])
    assert (pinned.headers["ETag"], pinned.body) == (etag, first.body)
    known = asked(hf.Caller(), "ann/tea", "ann/coffee", kinds=["arrow", "phatgoose"],
                  headers={"If_None_Match": f'"x", {etag}'})  # fmt: skip
    assert (known.status_code, known.body) == (304, b"")
    assert known.headers["ETag"] == etag


def test_whatever_changes_the_pack_changes_its_etag(ann, two) -> None:
    etags = {
        asked(hf.Caller(), *names, **more).headers["ETag"]
        for names, more in [
            (("ann/tea", "ann/coffee"), {}),
            (("ann/coffee", "ann/tea"), {}),
            (("ann/tea",), {}),
            (("ann/tea", "ann/coffee"), {"kinds": ["arrow", "phatgoose"]}),
            (("ann/tea", "ann/coffee"), {"modules": ["query"]}),
        ]
    }
    hf.put(ann[0], two[0], {WEIGHTS: lora(5, rank=3)[WEIGHTS]})
    Revision.objects.update(state=Revision.State.READY)
    measure(two[0])
    etags.add(asked(hf.Caller(), "ann/tea", "ann/coffee").headers["ETag"])
    assert len(etags) == 6


def test_modules_are_taken_by_name_or_by_the_end_of_it(two) -> None:
    for named in ("query", tiny.QUERY):
        pack = reading.read(asked(hf.Caller(), "ann/tea", modules=[named]).body)
        assert list(pack.arrow) == [tiny.QUERY]
    refused = asked(hf.Caller(), "ann/tea", modules=["uery"])
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/modules")


def test_experts_of_two_bases_are_refused_by_name(ann, two) -> None:
    other = BaseModel.objects.create(name="acme/other")
    BaseAlias.objects.create(key="acme/other", base=other)
    tree = {**lora(3), "README.md": tiny.card(base_model="acme/other")}
    tree[CONFIG] = json.dumps({**json.loads(tree[CONFIG]), "base_model_name_or_path": "acme/other"}).encode()
    stranger = ready(ann[0], "stranger", tree)
    measure(stranger)
    answer = asked(hf.Caller(), "ann/tea", "ann/stranger")
    assert answer.status_code == 400
    (fault,) = answer.json()["errors"]
    assert (fault["pointer"], fault["met"], fault["wanted"]) == ("/experts/1", "acme/other", tiny.BASE)
    assert "ann/stranger" in answer.json()["detail"]
    unknown = asked(hf.Caller(), "ann/tea", base_model="acme/unheard-of")
    assert (unknown.status_code, unknown.json()["code"]) == (422, "base-unknown")


def test_a_hidden_expert_is_answered_like_one_that_does_not_exist(ann, two) -> None:
    experts.change_visibility(user=ann[0], expert=two[0], visibility="private")
    for caller in (hf.Caller(), hf.person("rob")[1]):
        hidden, absent = asked(caller, "ann/tea", "ann/coffee"), asked(caller, "ann/tee", "ann/coffee")
        assert hidden.status_code == absent.status_code == 404
        bodies = [json.dumps({**one.json(), "request_id": ""}) for one in (hidden, absent)]
        assert bodies[0].replace("ann/tea", "X") == bodies[1].replace("ann/tee", "X")
    own = asked(ann[1], "ann/tea", "ann/coffee")
    assert own.status_code == 200
    assert own.headers["Cache-Control"] == "private, no-store"
    # What a stranger may have kept of it opens nothing.
    headers = {"If_None_Match": own.headers["ETag"]}
    assert asked(hf.Caller(), "ann/tea", "ann/coffee", headers=headers).status_code == 404
    assert "private" not in asked(hf.Caller(), "ann/coffee").headers["Cache-Control"]


def test_experts_that_are_not_ready_are_named(ann, two) -> None:
    Revision.objects.filter(expert=two[1]).update(state=Revision.State.PROCESSING)
    answer = asked(hf.Caller(), "ann/tea", "ann/coffee")
    assert (answer.status_code, answer.json()["code"]) == (409, "not-ready")
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/experts/1"]


def test_missing_prototypes_are_computed_first(ann) -> None:
    made = ready(ann[0], "tea", TEA)
    answer = asked(hf.Caller(), "ann/tea")
    assert (answer.status_code, answer.json()["code"]) == (503, "pack-pending")
    assert answer.headers["Retry-After"]
    runner.run(answer.json()["job"])
    assert Fingerprint.objects.get().revision.expert == made
    assert asked(hf.Caller(), "ann/tea").status_code == 200


def test_prototypes_that_could_not_be_computed_are_an_answer_too(ann) -> None:
    made = ready(ann[0], "tea", TEA)
    Revision.objects.get(expert=made).files.get(path=WEIGHTS).delete()
    runner.run(asked(hf.Caller(), "ann/tea").json()["job"])
    answer = asked(hf.Caller(), "ann/tea")
    assert (answer.status_code, answer.json()["code"]) == (409, "not-ready")


def test_kinds_of_adapter_without_prototypes_make_no_pack(ann, two) -> None:
    from safetensors.numpy import save

    config = {"peft_type": "IA3", "base_model_name_or_path": tiny.BASE, "feedforward_modules": [],
              "target_modules": ["query"]}  # fmt: skip
    weights = save({f"base_model.model.{tiny.QUERY}.ia3_l": np.full((SIZE, 1), 1.5, np.float32)}, {"format": "pt"})
    made = ready(ann[0], "gains", {"README.md": tiny.card(), CONFIG: json.dumps(config).encode(), WEIGHTS: weights})
    measure(made)
    assert asked(hf.Caller(), "ann/gains").status_code == 400
    pack = reading.read(asked(hf.Caller(), "ann/gains", "ann/tea").body)
    assert pack.masks["arrow"][tiny.QUERY].tolist() == [False, True]


def test_what_a_compressed_form_decodes_to_has_prototypes_of_its_own(ann) -> None:
    tree = tiny.lora(seed=1, rank=3, alpha=6, modules=MODULES)
    made = ready(ann[0], "tea", tree)
    measure(made)
    answer = asked(hf.Caller(), "ann/tea@compeft-k10")
    assert (answer.status_code, answer.json()["code"]) == (503, "form-pending")
    runner.run(answer.json()["job"])
    assert Job.objects.get(pk=answer.json()["job"]).state == Job.State.DONE
    pending = asked(hf.Caller(), "ann/tea@compeft-k10")
    assert pending.json()["code"] == "pack-pending"
    runner.run(pending.json()["job"])
    pack = reading.read(asked(hf.Caller(), "ann/tea@compeft-k10", "ann/tea").body)
    decoded = Revision.objects.get(form="compeft-k10")
    weights = ann[1].get(f"/ann/tea/resolve/{decoded.commit}/{WEIGHTS}").body
    assert pack.members[0].sha256 == hashlib.sha256(weights).hexdigest() != pack.members[1].sha256
    right = np.linalg.svd(delta({CONFIG: tree[CONFIG], WEIGHTS: weights}, tiny.QUERY))[2]
    assert abs(pack.arrow[tiny.QUERY][0] @ right[0]) > 0.999


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/experts"),
        ({"experts": ["ann/tea"], "query": "tea"}, "/experts"),
        ({"experts": []}, "/experts"),
        ({"experts": ["ann/tea", "ann/Tea"]}, "/experts/1"),
        ({"experts": ["ann/tea"], "kinds": []}, "/kinds"),
        ({"experts": ["ann/tea"], "kinds": ["glider"]}, "/kinds/0"),
        ({"experts": ["ann/tea"], "module": ["q"]}, "/module"),
        ({"query": "tea", "top_k": 0}, "/top_k"),
        ({"query": "tea", "top_k": 65}, "/top_k"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_field(two, body, pointer) -> None:
    answer = hf.Caller().json("POST", URL, {"base_model": tiny.BASE, **body})
    assert answer.status_code == 422, answer.body
    assert pointer in [fault["pointer"] for fault in answer.json()["errors"]]


def test_too_many_experts_and_too_many_bytes_are_refused_before_anything_is_read(two, settings) -> None:
    settings.HUB_PACK_MAX_EXPERTS = 1
    assert asked(hf.Caller(), "ann/tea", "ann/coffee").status_code == 422
    settings.HUB_PACK_MAX_EXPERTS = 2
    settings.HUB_PACK_MAX_BYTES = Fingerprint.objects.first().blob.size_bytes + 10
    assert asked(hf.Caller(), "ann/tea").status_code == 200
    answer = asked(hf.Caller(), "ann/tea", "ann/coffee")
    assert (answer.status_code, answer.json()["code"]) == (413, "too-large")


def test_an_unknown_revision_is_not_found(two) -> None:
    assert asked(hf.Caller(), "ann/tea@v9").status_code == 404


def test_a_query_takes_the_experts_that_fit_it_and_that_the_caller_may_see(ann, router) -> None:
    from registry.services import routing

    made = {
        name: ready(ann[0], name, {**lora(seed), "README.md": tiny.card(task)}, private=is_private)
        for seed, (name, task, is_private) in enumerate(
            [
                ("tea", "Sorts questions about green tea.", False),
                ("rain", "Forecasts rain for tomorrow.", False),
                ("secret", "Sorts questions about green tea leaves.", True),
            ]
        )
    }
    for expert in made.values():
        head = Revision.objects.get(expert=expert)
        routing.embed(head)
        routing.publish_to_index(head)
    measure(*made.values())
    router.refresh()
    body = {
        "base_model": tiny.BASE,
        "query": "Which green tea is this?",
        "top_k": 1,
        "kinds": ["arrow", "glider_global"],
    }
    answer = hf.Caller().json("POST", URL, body)
    assert answer.status_code == 200, answer.body
    pack = reading.read(answer.body)
    assert [one.expert for one in pack.members] == ["ann/tea"]
    assert np.linalg.norm(pack.glider_global[0]) == pytest.approx(1, abs=1e-3)
    seen = hf.Caller().json("POST", URL, {**body, "top_k": 8})
    assert {one.expert for one in reading.read(seen.body).members} == {"ann/tea", "ann/rain"}
    own = ann[1].json("POST", URL, {**body, "top_k": 8})
    assert {one.expert for one in reading.read(own.body).members} == {"ann/tea", "ann/rain", "ann/secret"}
    text = ann[1].get("/api/v1/experts/ann/tea/neighbours").json()["by_text"]
    assert [row["expert"] for row in text] == ["ann/secret", "ann/rain"]
    text = hf.Caller().get("/api/v1/experts/ann/tea/neighbours").json()["by_text"]
    assert [row["expert"] for row in text] == ["ann/rain"]
