"""Merges: registered once, computed by the worker's own function, readable by whoever may read every parent."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from registry import jobs
from registry.models import File, Job, Merge, MergeParent, Revision
from registry.services import bases, experts, merges
from tests import tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND, compute, ready, recipe, result
from workers import runner

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def pair(ann):
    return ready(ann[0], "first", FIRST), ready(ann[0], "second", SECOND)


def deltas(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Scaling times B times A for each module, straight from the files by numpy."""
    config, tensors = json.loads(files["adapter_config.json"]), load(files["adapter_model.safetensors"])
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scaling * tensors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a
    return found


def test_a_merge_is_the_weighted_sum_of_scaled_deltas(ann, pair) -> None:
    merge, is_new = merges.register(user=ann[0], body=recipe())
    assert is_new
    assert merge.state == Merge.State.QUEUED
    merge = compute(merge)
    assert merge.state == Merge.State.READY, merge.jobs.get().error
    first, second, got = deltas(FIRST), deltas(SECOND), deltas(result(merge))
    assert set(got) == {tiny.QUERY, tiny.VALUE}
    np.testing.assert_allclose(got[tiny.QUERY], 0.7 * first[tiny.QUERY], atol=1e-5)
    np.testing.assert_allclose(got[tiny.VALUE], 0.7 * first[tiny.VALUE] + 0.3 * second[tiny.VALUE], atol=1e-5)
    assert merge.report["energy_kept"] == pytest.approx(1)


def test_a_scaling_by_the_root_of_the_rank_is_honoured(ann, pair) -> None:
    files = dict(SECOND)
    config = json.loads(files["adapter_config.json"]) | {"use_rslora": True}
    files["adapter_config.json"] = json.dumps(config).encode()
    ready(ann[0], "third", files)
    body = recipe(experts=[{"expert": "ann/first", "weight": -0.5}, {"expert": "ann/third", "weight": 1.5}])
    got = deltas(result(compute(merges.register(user=ann[0], body=body)[0])))
    wanted = -0.5 * deltas(FIRST)[tiny.VALUE] + 1.5 * deltas(files)[tiny.VALUE]
    np.testing.assert_allclose(got[tiny.VALUE], wanted, atol=1e-5)


def test_the_result_is_a_repository_with_card_recipe_and_lineage(ann, pair, client) -> None:
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    files = result(merge)
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json", "recipe.json", "report.json",
    }  # fmt: skip
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model: sentence-transformers/all-MiniLM-L6-v2\nlibrary_name: peft\n")
    assert "| 0.7 | ann/first |" in card
    lineage = json.loads(files["lineage.json"])
    assert [(row["expert"], row["weight"]) for row in lineage["parents"]] == [
        (row.revision.expert.full_name, row.weight) for row in MergeParent.objects.filter(merge=merge)
    ]
    assert {row["weights_sha256"] for row in lineage["parents"]} == {
        hf.sha256(FIRST["adapter_model.safetensors"]),
        hf.sha256(SECOND["adapter_model.safetensors"]),
    }
    answer = client.head(f"/{merge.full_name}/resolve/main/adapter_config.json")
    assert (answer.status_code, answer["X-Repo-Commit"]) == (200, merge.commit)
    assert int(answer["Content-Length"]) == len(files["adapter_config.json"])
    assert Revision.objects.get(merge=merge).commit == merge.commit


def test_the_same_recipe_is_one_merge_with_one_job_whatever_the_order(ann, pair) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    turned = recipe(experts=list(reversed(recipe()["experts"])))
    again, is_new = merges.register(user=ann[0], body=turned)
    assert (again.pk, is_new) == (merge.pk, False)
    assert again.commit == merge.commit
    assert Job.objects.filter(kind="merge").count() == Merge.objects.count() == 1
    compute(merge)
    assert not merges.register(user=ann[0], body=recipe())[1]


def test_other_weights_or_parents_are_another_merge(ann, pair) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    swapped = recipe(experts=[{"expert": "ann/first", "weight": 0.3}, {"expert": "ann/second", "weight": 0.7}])
    other, _ = merges.register(user=ann[0], body=swapped)
    assert other.pk != merge.pk
    assert other.commit != merge.commit
    hf.put(
        ann[0],
        pair[0],
        {
            "adapter_model.safetensors": tiny.lora(seed=9, rank=2, alpha=6, modules=(tiny.QUERY, tiny.VALUE))[
                "adapter_model.safetensors"
            ]
        },
    )
    Revision.objects.update(state=Revision.State.READY)
    assert merges.register(user=ann[0], body=recipe())[0].pk not in {merge.pk, other.pk}


def test_a_merge_pins_its_parents(ann, pair) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    pinned = Revision.objects.get(expert=pair[0]).pk
    hf.put(ann[0], pair[0], {"README.md": tiny.card("Another card.")})
    assert merge.parents.filter(revision_id=pinned).exists()
    got = deltas(result(compute(merge)))
    np.testing.assert_allclose(got[tiny.QUERY], 0.7 * deltas(FIRST)[tiny.QUERY], atol=1e-5)


def test_a_second_run_of_the_job_changes_nothing(ann, pair) -> None:
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    before = list(File.objects.filter(revision__merge=merge).values_list("path", "blob_id"))
    merge.jobs.update(state=Job.State.QUEUED)
    runner.run(merge.jobs.get().pk)
    assert list(File.objects.filter(revision__merge=merge).values_list("path", "blob_id")) == before
    assert merge.jobs.get().state == Job.State.DONE


def test_a_cancelled_merge_starts_again_when_it_is_asked_for_again(ann, pair) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe())
    jobs.cancel(merge.jobs.get())
    merge.refresh_from_db()
    assert merge.state == Merge.State.CANCELLED
    again, is_new = merges.register(user=ann[0], body=recipe())
    assert (again.pk, is_new, again.state) == (merge.pk, True, Merge.State.QUEUED)
    assert compute(again).state == Merge.State.READY


def test_registering_needs_the_scope_merge_and_reading_does_not(ann, pair) -> None:
    reader = hf.person("rob", ["read", "write"])[1]
    refused = reader.json("POST", "/api/v1/merges", recipe())
    assert (refused.status_code, refused.json()["code"]) == (403, "scope-missing")
    assert hf.Caller().json("POST", "/api/v1/merges", recipe()).status_code == 401
    assert Merge.objects.count() == 0
    made = ann[1].json("POST", "/api/v1/merges", recipe())
    assert made.status_code == 202
    assert ann[1].json("POST", "/api/v1/merges", recipe()).status_code == 200
    body = reader.get(f"/api/v1/merges/{made.json()['id']}").json()
    assert body["repo"] == f"merges/{body['id']}"
    assert {"id", "digest", "state", "repo", "commit", "job", "report"} <= set(body)
    assert len(body["commit"]) == 40


def test_one_hidden_parent_hides_the_merge_at_once_and_everywhere(ann, pair) -> None:
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    stranger = hf.person("rob")[1]
    paths = [f"/api/v1/merges/{merge.pk}", f"/api/models/{merge.full_name}", f"/merges/{merge.pk}"]
    assert [stranger.get(path).status_code for path in paths] == [200, 200, 200]
    experts.change_visibility(user=ann[0], expert=pair[1], visibility="private")
    assert [stranger.get(path).status_code for path in paths] == [404, 404, 404]
    assert hf.Caller().get(f"/{merge.full_name}/resolve/main/recipe.json").status_code == 404
    assert stranger.get("/api/v1/merges").json()["items"] == []
    assert (
        stranger.get(
            f"/api/v1/by-hash/{File.objects.get(revision__merge=merge, path='recipe.json').blob_id}"
        ).status_code
        == 404
    )
    assert [ann[1].get(path).status_code for path in paths[:2]] == [200, 200]


def test_a_private_expert_is_no_parent_for_strangers(ann) -> None:
    ready(ann[0], "first", FIRST)
    ready(ann[0], "second", SECOND, private=True)
    stranger = hf.person("rob", ["merge", "read"])[1]
    hidden = stranger.json("POST", "/api/v1/merges", recipe())
    absent = stranger.json(
        "POST",
        "/api/v1/merges",
        recipe(experts=[{"expert": "ann/first", "weight": 1}, {"expert": "ann/nothing", "weight": 1}]),
    )
    assert hidden.status_code == absent.status_code == 404
    assert hidden.json()["errors"][0]["pointer"] == absent.json()["errors"][0]["pointer"] == "/experts/1/expert"


REFUSALS = {
    "unknown method": ({"method": "tiess"}, 422, "/method", "tiess"),
    "no method": ({"method": None}, 422, "/method", "nothing"),
    "unknown parameter": ({"parameters": {"densty": 0.2}, "method": "ties"}, 422, "/parameters/densty", "densty"),
    "parameter out of range": ({"parameters": {"density": 1.5}, "method": "ties"}, 422, "/parameters/density", "1.5"),
    "weight is no number": ({"experts": [{"expert": "ann/first", "weight": "x"}]}, 422, "/experts/0/weight", "'x'"),
    "weight is a truth": ({"experts": [{"expert": "ann/first", "weight": True}]}, 422, "/experts/0/weight", "True"),
    "no experts": ({"experts": []}, 422, "/experts", 0),
    "experts are no list": ({"experts": 7}, 422, "/experts", "7"),
    "an unknown field": ({"expert": []}, 422, "/expert", "expert"),
    "a field of an expert": ({"experts": [{"expert": "ann/first", "wieght": 1}]}, 422, "/experts/0/wieght", "wieght"),
    "an unknown base": ({"base_model": "nobody/knows"}, 422, "/base_model", "nobody/knows"),
    "a rank of nothing": ({"output": {"rank": 0}}, 422, "/output/rank", "0"),
    "a merge as a parent": ({"experts": [{"expert": "merges/abc", "weight": 1}]}, 422, "/experts/0/expert", "merges/abc"),
    "statistics that no expert has": ({"method": "fisher", "parameters": {}}, 409, "/experts/0/statistics", "nothing"),
    "no such revision": ({"experts": [{"expert": "ann/first", "revision": "dev", "weight": 1}]}, 404, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_recipe_is_refused_by_field_and_leaves_nothing(case: str, ann, pair) -> None:
    changes, status, pointer, met = REFUSALS[case]
    for path in ("/api/v1/merges", "/api/v1/merges/check"):
        answer = ann[1].json("POST", path, recipe(**changes))
        body = answer.json()
        assert (answer.status_code, answer["Content-Type"]) == (status, "application/problem+json"), body
        assert {"type", "title", "status", "detail", "code", "request_id", "errors"} <= set(body)
        if pointer is not None:
            fault = body["errors"][0]
            assert (fault["pointer"], fault["met"]) == (pointer, met)
            assert fault["wanted"] is not None
            assert fault["remedy"]
    assert Merge.objects.count() == Job.objects.filter(kind="merge").count() == 0


def test_experts_of_two_bases_are_refused_by_name(ann, pair) -> None:
    bases.register(user=ann[0], name="someone/other-base")
    ready(ann[0], "stranger", tiny.lora(base="someone/other-base"))
    for base in (tiny.BASE, None):
        body = recipe(
            base_model=base, experts=[{"expert": "ann/first", "weight": 1}, {"expert": "ann/stranger", "weight": 1}]
        )
        answer = ann[1].json("POST", "/api/v1/merges", body)
        assert (answer.status_code, answer.json()["code"]) == (409, "experts-incompatible")
        fault = answer.json()["errors"][0]
        assert (fault["pointer"], fault["met"], fault["wanted"]) == ("/experts/1", "someone/other-base", tiny.BASE)
    assert Merge.objects.count() == 0


def test_an_expert_that_is_not_ready_or_is_yanked_is_refused_with_the_remedy(ann, pair) -> None:
    Revision.objects.filter(expert=pair[0]).update(state=Revision.State.PROCESSING)
    waiting = ann[1].json("POST", "/api/v1/merges", recipe()).json()
    assert (waiting["status"], waiting["code"], waiting["errors"][0]["met"]) == (409, "not-ready", "processing")
    Revision.objects.filter(expert=pair[0]).update(state=Revision.State.READY)
    experts.yank(user=ann[0], expert=pair[1], yanked=True, reason="wrong labels")
    yanked = ann[1].json("POST", "/api/v1/merges", recipe()).json()
    assert (yanked["status"], yanked["code"]) == (409, "experts-incompatible")
    assert yanked["errors"][0]["remedy"] == "wrong labels"


def test_a_user_may_have_only_so_many_merges_waiting(ann, pair, settings) -> None:
    settings.HUB_MERGE_MAX_QUEUED = 1
    merges.register(user=ann[0], body=recipe())
    refused = ann[1].json("POST", "/api/v1/merges", recipe(method="svd", parameters={}))
    assert refused.status_code == 429
    assert refused["Retry-After"] == "10"
    assert Merge.objects.count() == 1
    assert ann[1].json("POST", "/api/v1/merges", recipe()).status_code == 200


def test_checking_a_recipe_tells_its_address_and_registers_nothing(ann, pair) -> None:
    answer = ann[1].json("POST", "/api/v1/merges/check", recipe()).json()
    assert Merge.objects.count() == 0
    merge, _ = merges.register(user=ann[0], body=recipe())
    assert (answer["ok"], answer["repo"], answer["commit"]) == (True, merge.full_name, merge.commit)


def test_a_merge_leaves_no_file_behind_in_staging(ann, pair, settings) -> None:
    compute(merges.register(user=ann[0], body=recipe())[0])
    assert list(Path(settings.HUB_STAGING_DIR).iterdir()) == []
