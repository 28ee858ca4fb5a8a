"""Recipes before any work: what a check tells from rows alone, and what is refused by name, without a row or a job."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import load, save

from moerge.merging.cost import FIXED_BYTES
from registry.models import BaseModel, Job, Kinship, Merge, Revision
from registry.services import base_weights, bases, experts, layouts, merges
from tests import tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND, ready

pytestmark = pytest.mark.django_db

KEY = "encoder.layer.0.attention.self.key"
EMBEDDING = "embeddings.word_embeddings"
DOORS = ("/api/v1/merges/check", "/api/v1/merges")


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def pair(ann):
    return ready(ann[0], "first", FIRST), ready(ann[0], "second", SECOND)


def recipe(*names: str, **changes) -> dict:
    names = names or ("first", "second")
    share = 1 / len(names)
    body = {"method": "linear", "experts": [{"expert": f"ann/{name}", "weight": share} for name in names]}
    return {**body, **changes}


def checked(caller: hf.Caller, body: dict) -> dict:
    answer = caller.json("POST", DOORS[0], body)
    assert answer.status_code == 200, answer.json()
    return answer.json()


def refused(caller: hf.Caller, body: dict) -> dict:
    """The problem that both doors answer, in less than a second and without a trace."""
    found = []
    for door in DOORS:
        since = time.process_time()
        answer = caller.json("POST", door, body)
        assert time.process_time() - since < 1
        assert answer["Content-Type"] == "application/problem+json", answer.json()
        found.append({key: value for key, value in answer.json().items() if key != "request_id"})
    assert found[0] == found[1]
    assert Merge.objects.count() == Job.objects.filter(kind__in=["merge", "kinship"]).count() == 0
    return found[0]


def changed(files: dict[str, bytes], **config) -> dict[str, bytes]:
    """The same files with other fields in the config."""
    fields = json.loads(files["adapter_config.json"]) | config
    return {**files, "adapter_config.json": json.dumps(fields).encode()}


def with_tensors(files: dict[str, bytes], more: dict[str, np.ndarray], **config) -> dict[str, bytes]:
    arrays = load(files["adapter_model.safetensors"]) | more
    return changed({**files, "adapter_model.safetensors": save(arrays, metadata={"format": "pt"})}, **config)


def licensed(files: dict[str, bytes], licence: str) -> dict[str, bytes]:
    return {**files, "README.md": tiny.card(license=licence)}


def base_with_weights(**weights) -> BaseModel:
    """The base of the tiny adapters, as after the operator has added its weights."""
    row = hf.base()
    row.weights = {"folder": "tiny", "digest": "b" * 64, "files": {"model.safetensors": {"size": 1000}}, **weights}
    row.save()
    return row


# What a check tells


def test_a_check_tells_ranks_modules_sizes_and_costs_from_shapes_alone(ann, pair) -> None:
    answer = checked(ann[1], recipe())
    first, second = answer["experts"]
    assert (first["expert"], first["kind"], first["family"], first["rank"], first["modules"]) == (
        "ann/first", "lora", "lora", 2, 2,
    )  # fmt: skip
    assert (second["missing_count"], second["missing"]) == (1, [tiny.QUERY])
    assert (first["missing_count"], first["missing"]) == (0, [])
    # Rank 7 for two modules of 384 x 384, float32.
    values = 2 * 7 * (384 + 384)
    assert answer["output"]["kind"] == "lora"
    assert answer["output"]["rank"] == 7
    assert 4 * values < answer["output"]["bytes"] < 4 * values + 8192
    assert answer["cost"]["memory_bytes"] > FIXED_BYTES
    assert answer["cost"]["written_bytes"] == answer["output"]["bytes"]
    assert answer["cost"]["cpu_seconds"] > 0
    assert any("ann/second lacks 1 module" in warning for warning in answer["warnings"])
    merge, _ = merges.register(user=ann[0], body=recipe())
    assert (answer["repo"], answer["commit"], answer["state"]) == (merge.full_name, merge.commit, None)
    assert checked(ann[1], recipe())["state"] == "queued"


def test_the_size_told_is_that_of_the_file_that_is_made(ann, pair) -> None:
    from workers import runner

    told = checked(ann[1], recipe())["output"]
    merge, _ = merges.register(user=ann[0], body=recipe())
    runner.run(merge.jobs.get().pk)
    made = Revision.objects.get(merge=merge).files.get(path="adapter_model.safetensors").blob.size_bytes
    assert made <= told["bytes"] <= made + 8192
    merge.refresh_from_db()
    assert merge.report["rank"] == told["rank"]


def test_a_dense_method_is_warned_about_the_rank_that_keeps_a_part(ann, pair) -> None:
    assert any("rank 7" in warning for warning in checked(ann[1], recipe(method="ties"))["warnings"])
    assert not any("low rank" in warning for warning in checked(ann[1], recipe(method="linear"))["warnings"])
    assert checked(ann[1], recipe(method="ties", output={"kind": "delta"}))["output"]["rank"] is None


def test_a_revision_from_before_modules_were_written_down_can_still_be_asked_for(ann, pair) -> None:
    row = Revision.objects.get(expert=pair[0])
    row.facts = {name: value for name, value in row.facts.items() if name not in {"layout", "family", "saved_shapes"}}
    row.save()
    answer = checked(ann[1], recipe())
    assert (answer["cost"], answer["output"]["rank"], answer["experts"][0]["modules"]) == (None, None, None)
    assert any("ann/first" in warning and "modules" in warning for warning in answer["warnings"])
    assert merges.register(user=ann[0], body=recipe())[1]


def test_modules_of_a_mixture_of_experts_take_little_room_and_come_back_as_they_were() -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}": (768, 2048)
        for layer in range(48) for expert in range(128) for part in parts
    } | {"lm_head": (32000, 2048), "model.layers.07.odd": (8, 4), "model.layers.3.odd": (8, 4)}  # fmt: skip
    ranks = {name: 8 + place % 2 * (name[-1] == "d") for place, name in enumerate(shapes)}
    lines = layouts.pack(shapes, ranks)
    assert len(json.dumps(lines)) < 100_000
    found = layouts.unpack(json.loads(json.dumps(lines)))
    assert {name: module.shape for name, module in found.items()} == shapes
    assert {name: module.rank for name, module in found.items()} == ranks


def test_an_expert_answers_without_the_list_of_all_its_modules(ann, pair) -> None:
    facts = ann[1].get("/api/v1/experts/ann/first").json()["facts"]
    assert facts["module_count"] == 2
    assert "layout" not in facts
    assert "layout" in Revision.objects.get(expert=pair[0]).facts


# How it is written


def test_a_recipe_may_be_written_in_yaml_or_for_mergekit_and_is_the_same_merge(ann, pair) -> None:
    told = checked(ann[1], recipe(method="ties", parameters={"variant": "mergekit", "density": 0.5}))
    ours = f"""
base_model: {tiny.BASE}
method: ties   # as in the paper
parameters: {{variant: mergekit, density: 0.5}}
experts:
  - {{expert: ann/first, weight: 0.5}}
  - {{expert: ann/second, weight: 0.5}}
"""
    mergekit = f"""
merge_method: ties
base_model: {tiny.BASE}
models:
  - {{model: {tiny.BASE}+ann/first, parameters: {{weight: 0.5, density: 0.5}}}}
  - {{model: {tiny.BASE}+ann/second, parameters: {{weight: 0.5, density: 0.5}}}}
parameters: {{normalize: {{value: true}}}}
"""
    for text, kind in [(ours, "application/yaml"), (ours, "text/yaml"), (mergekit, "application/yaml; charset=utf-8")]:
        answer = ann[1].send("POST", DOORS[0], data=text, kind=kind)
        assert answer.status_code == 200, answer.json()
        assert answer.json()["recipe"]["parameters"]["density"] == 0.5
    assert ann[1].send("POST", DOORS[0], data=ours, kind="text/yaml").json()["digest"] == told["digest"]
    made = ann[1].send("POST", DOORS[1], data=ours + "start: false\n", kind="application/yaml")
    assert (made.status_code, made.json()["digest"], made.json()["state"]) == (202, told["digest"], "registered")


def test_text_that_is_no_yaml_is_malformed_and_a_wrong_field_is_named(ann, pair) -> None:
    for text, status, word in [
        ("method: [linear", 400, "Line"),
        ("- linear", 400, "mapping"),
        ("a: &x 1\nb: *x", 422, "anchor"),
        ("merge_method: passthrough\nmodels: [{model: ann/first}]", 422, "layer_swapping"),
        ("method: linear\nexperts: [{expert: ann/first, wieght: 1}]", 422, "wieght"),
        ("method: linear\nexperts: []\n# " + "x" * 300_000, 400, "long"),
    ]:
        answer = ann[1].send("POST", DOORS[0], data=text, kind="application/yaml")
        assert (answer.status_code, answer["Content-Type"]) == (status, "application/problem+json"), answer.json()
        assert word in answer.content.decode()


# What is refused


def test_shapes_that_differ_are_refused_with_module_and_sizes(ann) -> None:
    base = bases.register(user=ann[0], name="someone/base")
    ready(ann[0], "first", tiny.lora(base=base.name, size=8))
    base.refresh_from_db()
    base.shapes = {}
    base.save()
    ready(ann[0], "second", tiny.lora(base=base.name, size=12))
    problem = refused(ann[1], recipe())
    assert (problem["status"], problem["code"]) == (409, "experts-incompatible")
    assert all(word in problem["detail"] for word in ("ann/first", "ann/second", tiny.QUERY, "8 x 8", "12 x 12"))
    assert problem["errors"][0]["pointer"] == "/experts/1/expert"
    assert problem["errors"][0]["met"] == {"module": tiny.QUERY, "shape": [12, 12]}


def embedding_lora(tokens: int) -> dict[str, bytes]:
    arrays = {
        f"base_model.model.{EMBEDDING}.lora_embedding_A": np.ones((2, tokens), np.float32),
        f"base_model.model.{EMBEDDING}.lora_embedding_B": np.ones((8, 2), np.float32),
    }
    return {
        "README.md": tiny.card(),
        "adapter_config.json": tiny.config(target_modules=["word_embeddings"]),
        "adapter_model.safetensors": save(arrays, metadata={"format": "pt"}),
    }


def test_other_vocabularies_are_refused_with_their_sizes(ann) -> None:
    ready(ann[0], "first", embedding_lora(100))
    BaseModel.objects.update(shapes={})
    ready(ann[0], "second", embedding_lora(101))
    problem = refused(ann[1], recipe())
    assert problem["errors"][0]["pointer"] == "/experts/1/expert"
    assert "vocabularies" in problem["detail"]
    assert "8 x 100" in problem["detail"]
    assert "8 x 101" in problem["detail"]


def head(labels: int) -> dict[str, bytes]:
    weight = {"base_model.model.classifier.weight": np.ones((labels, 384), np.float32)}
    return with_tensors(FIRST, weight, modules_to_save=["classifier"])


def test_saved_modules_of_one_expert_are_kept_and_those_of_two_need_the_base_or_a_choice(ann) -> None:
    ready(ann[0], "first", head(3))
    ready(ann[0], "second", SECOND)
    ready(
        ann[0], "third", with_tensors(head(3), {"base_model.model.classifier.weight": np.zeros((3, 384), np.float32)})
    )
    ready(ann[0], "fourth", head(4))
    assert checked(ann[1], recipe("first", "second"))["recipe"].get("base_weights") is None
    Kinship.objects.all().delete()
    Job.objects.filter(kind="kinship").delete()
    problem = refused(ann[1], recipe("first", "third"))
    assert problem["errors"][0]["pointer"] == "/experts/1/expert"
    assert all(word in problem["detail"] for word in ("ann/first", "ann/third", "classifier.weight"))
    assert "add_base_weights" in problem["errors"][0]["remedy"]
    different = refused(ann[1], recipe("first", "fourth", output={"saved": "ann/first"}))
    assert "3 x 384" in different["detail"]
    assert "4 x 384" in different["detail"]
    unknown = refused(ann[1], recipe("first", "third", output={"saved": "ann/nobody"}))
    assert (unknown["status"], unknown["errors"][0]["pointer"]) == (422, "/output/saved")
    kept = checked(ann[1], recipe("first", "third", output={"saved": "ann/first"}))
    assert kept["recipe"]["output"]["saved"] == "ann/first"


def test_saved_modules_of_two_are_merged_where_the_base_has_them_and_refused_where_it_has_not(
    ann, settings, tmp_path
) -> None:
    settings.HUB_BASES_DIR = tmp_path
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    base = hf.base()
    ready(ann[0], "first", head(3))
    ready(
        ann[0], "second", with_tensors(head(3), {"base_model.model.classifier.weight": np.zeros((3, 384), np.float32)})
    )
    for names, is_there in ((("encoder.other.weight",), False), (("classifier.weight",), True)):
        weights = {name: np.ones((3, 384), np.float32) for name in names}
        (tmp_path / "tiny" / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        BaseModel.objects.filter(pk=base.pk).update(shapes={})
        base.refresh_from_db()
        base_weights.add(user=None, base=base, folder="tiny")
        if is_there:
            assert checked(ann[1], recipe())["recipe"]["base_weights"] == base.weights["digest"]
        else:
            problem = refused(ann[1], recipe())
            assert "classifier.weight" in problem["detail"]
            assert [fault["pointer"] for fault in problem["errors"]] == ["/experts/1/expert", "/output/saved"]


def dora() -> dict[str, bytes]:
    more = {
        f"base_model.model.{module}.lora_magnitude_vector": np.ones(384, np.float32)
        for module in (tiny.QUERY, tiny.VALUE)
    }
    return with_tensors(FIRST, more, use_dora=True)


def ia3(*modules: str) -> dict[str, bytes]:
    arrays = {f"base_model.model.{module}.ia3_l": np.full((384, 1), 1.5, np.float32) for module in modules}
    config = {
        "peft_type": "IA3", "base_model_name_or_path": tiny.BASE, "feedforward_modules": [],
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    return {
        "README.md": tiny.card(),
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(arrays, metadata={"format": "pt"}),
    }


def test_what_needs_the_base_is_refused_with_the_way_to_add_it_and_taken_once_it_is_there(ann) -> None:
    ready(ann[0], "first", FIRST)
    ready(ann[0], "dora", dora())
    ready(ann[0], "ia3", ia3(tiny.QUERY))
    bodies = [
        (recipe("first", "dora"), "/experts/1/expert", "ann/dora"),
        (recipe("first", "ia3"), "/experts/1/expert", "ann/ia3"),
        (recipe("ia3", output={"kind": "lora"}), "/output/kind", "ann/ia3"),
        (recipe("first", output={"kind": "full"}), "/output/kind", tiny.BASE),
    ]
    for body, pointer, name in bodies:
        problem = refused(ann[1], body)
        assert (problem["status"], problem["code"]) == (409, "experts-incompatible")
        assert problem["errors"][0]["pointer"] == pointer
        assert name in problem["detail"]
        assert f"bin/manage add_base_weights {tiny.BASE} FOLDER" in problem["errors"][0]["remedy"]
    base_with_weights()
    for body, _, _ in bodies:
        assert checked(ann[1], body)["recipe"]["base_weights"] == "b" * 64
    assert "base_weights" not in checked(ann[1], recipe("first"))["recipe"]
    other = ann[1].json("POST", DOORS[0], recipe("first", base_weights="c" * 64)).json()
    assert (other["status"], other["errors"][0]["pointer"]) == (409, "/base_weights")


def test_experts_of_ia3_become_ia3_unless_something_else_is_asked_for(ann) -> None:
    ready(ann[0], "first", FIRST)
    ready(ann[0], "one", ia3(tiny.QUERY, KEY))
    ready(ann[0], "two", ia3(tiny.QUERY))
    answer = checked(ann[1], recipe("one", "two"))
    assert answer["recipe"]["output"]["kind"] == answer["output"]["kind"] == "ia3"
    assert "base_weights" not in answer["recipe"]
    assert answer["experts"][1]["missing"] == [KEY]
    assert [one["modules"] for one in answer["experts"]] == [2, 1]
    Job.objects.filter(kind="kinship").delete()
    problem = refused(ann[1], recipe("one", "first", output={"kind": "ia3"}))
    assert (problem["errors"][0]["pointer"], problem["errors"][0]["met"]) == ("/experts/1/expert", "lora")


def test_numbers_that_cannot_work_are_refused_by_field(ann, pair, settings) -> None:
    zero = [{"expert": "ann/first", "weight": 1}, {"expert": "ann/second", "weight": -1}]
    cases = [
        (recipe(experts=zero, parameters={"normalize": True}), 422, "/experts"),
        (recipe(method="ties", parameters={"density": 0}), 422, "/parameters/density"),
        (recipe(output={"rank": 385}), 422, "/output/rank"),
        (recipe(method="cat", output={"rank": 3}), 422, "/output/rank"),
        (recipe(method="cat", output={"rank": {"energy": 0.9}}), 422, "/output/rank"),
        (recipe(experts=[{"expert": f"ann/x{place}", "weight": 1} for place in range(1000)]), 422, "/experts"),
        (recipe(acknowledge_licences="yes"), 422, "/acknowledge_licences"),
        (recipe(licence=7), 422, "/licence"),
        (recipe(experts=[{"expert": "ann/first", "revision": "f" * 40, "weight": 1}]), 404, "/experts/0/revision"),
    ]
    for body, status, pointer in cases:
        problem = refused(ann[1], body)
        assert (problem["status"], problem["errors"][0]["pointer"]) == (status, pointer)
        assert problem["errors"][0]["wanted"] is not None
    settings.HUB_MERGE_MEMORY_BYTES = 1000
    problem = refused(ann[1], recipe())
    assert (problem["status"], problem["errors"][0]["pointer"], problem["errors"][0]["wanted"]) == (
        422,
        "/experts",
        1000,
    )


def test_a_thousand_parents_are_refused_before_one_of_them_is_looked_up(ann, django_assert_num_queries) -> None:
    from registry.errors import RecipeInvalid
    from registry.services import recipes

    body = {"method": "linear", "experts": [{"expert": f"ann/x{place}", "weight": 1} for place in range(1000)]}
    with django_assert_num_queries(0), pytest.raises(RecipeInvalid):
        recipes.resolve(viewer=ann[0], body=body)


def test_a_hidden_and_a_deleted_parent_answer_as_one_that_never_was(ann) -> None:
    ready(ann[0], "first", FIRST)
    body = recipe("first", "second")
    stranger = hf.person("rob", ["read", "merge"])[1]
    absent = refused(stranger, body)
    hidden = ready(ann[0], "second", SECOND, private=True)
    assert refused(stranger, body) == absent
    assert checked(ann[1], body)["ok"]
    Job.objects.filter(kind="kinship").delete()
    experts.delete(user=ann[0], expert=hidden)
    assert refused(ann[1], body) == refused(stranger, body) == absent
    assert (absent["status"], absent["errors"][0]["pointer"]) == (404, "/experts/1/expert")


# Statistics


def test_statistics_of_an_expert_go_into_the_recipe_where_the_method_needs_them(ann) -> None:
    stats = save(
        {f"{module}.fisher_diag": np.ones((384, 384), np.float32) for module in (tiny.QUERY, tiny.VALUE)},
        metadata={"kinds": "fisher_diag", "examples": "8", "label_policy": "true"},
    )
    ready(ann[0], "first", {**FIRST, "stats.safetensors": stats})
    ready(ann[0], "second", SECOND)
    problem = refused(ann[1], recipe("first", "second", method="fisher"))
    assert (problem["status"], problem["errors"][0]["pointer"]) == (409, "/experts/1/statistics")
    assert "ann/second" in problem["detail"]
    assert "fisher" in problem["detail"]
    assert "/experts/0/statistics" in refused(ann[1], recipe("first", method="regmean"))["errors"][0]["pointer"]
    answer = checked(ann[1], recipe("first", method="fisher"))
    assert answer["recipe"]["experts"][0]["statistics"] == hf.sha256(stats)


# Licences


def test_licences_that_do_not_join_block_a_merge_and_both_experts_are_named(ann) -> None:
    BaseModel.objects.filter(pk=hf.base().pk).update(licence="apache-2.0")
    ready(ann[0], "first", licensed(FIRST, "gpl-2.0"))
    ready(ann[0], "second", licensed(SECOND, "agpl-3.0"))
    ready(ann[0], "third", licensed(SECOND, "cc-by-nd-4.0"))
    ready(ann[0], "fourth", licensed(SECOND, "cc-by-nc-4.0"))
    ready(ann[0], "fifth", licensed(SECOND, "mit"))
    problem = refused(ann[1], recipe("first", "second"))
    assert (problem["status"], problem["code"]) == (409, "licence-blocked")
    assert {fault["pointer"] for fault in problem["errors"]} == {"/experts/0/expert", "/experts/1/expert"}
    assert {fault["met"] for fault in problem["errors"]} == {"ann/first: gpl-2.0", "ann/second: agpl-3.0"}
    assert "ann/third" in refused(ann[1], recipe("third"))["detail"]
    relabelled = refused(ann[1], recipe("fourth", "fifth", licence="mit"))
    assert relabelled["code"] == "licence-blocked"
    assert relabelled["errors"][0]["met"] == "ann/fourth: cc-by-nc-4.0"
    licence = checked(ann[1], recipe("fourth", "fifth"))["licence"]
    assert (licence["verdict"], licence["licence"]) == ("ok", "cc-by-nc-4.0")
    BaseModel.objects.update(licence="llama3.1")
    problem = refused_after_checks(ann[1], recipe("first", "fifth"))
    assert {fault["pointer"] for fault in problem["errors"]} == {"/experts/0/expert", "/base_model"}


def refused_after_checks(caller: hf.Caller, body: dict) -> dict:
    Job.objects.filter(kind="kinship").delete()
    return refused(caller, body)


def test_unknown_licences_warn_and_can_be_answered_for(ann, settings) -> None:
    BaseModel.objects.filter(pk=hf.base().pk).update(licence="apache-2.0")
    ready(ann[0], "first", licensed(FIRST, "other"))
    ready(ann[0], "second", SECOND)
    answer = checked(ann[1], recipe())
    assert (answer["licence"]["verdict"], answer["licence"]["acknowledgement_needed"]) == ("warn", False)
    assert any("ann/first" in warning and "other" in warning for warning in answer["warnings"])
    merge, _ = merges.register(user=ann[0], body=recipe())
    assert (merge.licence["verdict"], merge.licence["acknowledged"]) == ("warn", None)
    settings.HUB_MERGE_UNKNOWN_LICENCES = "acknowledge"
    assert checked(ann[1], recipe())["licence"]["acknowledgement_needed"]
    asked = ann[1].json("POST", DOORS[1], recipe())
    assert (asked.status_code, asked.json()["code"]) == (409, "licence-unacknowledged")
    assert asked.json()["errors"][0]["pointer"] == "/acknowledge_licences"
    taken = ann[1].json("POST", DOORS[1], recipe(acknowledge_licences=True))
    assert taken.status_code == 200
    merge.refresh_from_db()
    assert merge.licence["acknowledged"]["by"] == "ann"
    assert taken.json()["licence"]["acknowledged"]["at"].startswith("20")
    # Licences are no part of what a merge is.
    assert Merge.objects.count() == 1


def test_an_upload_whose_licence_contradicts_its_base_is_warned_about(ann) -> None:
    BaseModel.objects.filter(pk=hf.base().pk).update(licence="llama3.1")
    row = Revision.objects.get(expert=ready(ann[0], "first", licensed(FIRST, "mit")))
    assert any("llama3.1" in warning and "mit" in warning for warning in row.facts["warnings"])
    row = Revision.objects.get(expert=ready(ann[0], "second", licensed(FIRST, "llama3.1")))
    assert not any("licence" in warning for warning in row.facts["warnings"])
