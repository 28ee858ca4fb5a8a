"""Where merges come from: the graph that readers may see, the record beside a result, and its card."""

import json
from datetime import timedelta

import pytest
import yaml
from django.utils import timezone

from registry.models import Expert, Merge, MergeParent, Ref, Revision
from registry.services import experts, lineage, merges
from tests import tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND, compute, merge_of, ready, recipe, result

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


@pytest.fixture
def pair(ann):
    return ready(ann[0], "first", FIRST), ready(ann[0], "second", SECOND)


def head(expert) -> str:
    return Ref.objects.get(expert=expert, name="main").revision.commit


def names(graph: dict) -> set[str]:
    return {node["id"] for node in graph["nodes"]}


def test_a_merge_tells_its_parents_at_the_revisions_that_are_pinned(ann, pair) -> None:
    first, second = (f"{expert.full_name}@{head(expert)}" for expert in pair)
    merge = merge_of(pair)
    hf.put(ann[0], pair[0], {"README.md": tiny.card("Another card.")})
    graph = hf.Caller().get(f"/api/v1/merges/{merge.pk}/lineage").json()
    assert names(graph) == {f"base:{tiny.BASE}", first, second, merge.full_name}
    assert {(edge["origin"], edge["target"], edge["kind"], edge["weight"]) for edge in graph["edges"]} == {
        (f"base:{tiny.BASE}", first, "trained_on", None),
        (f"base:{tiny.BASE}", second, "trained_on", None),
        (first, merge.full_name, "merged_into", 0.5),
        (second, merge.full_name, "merged_into", 0.5),
    }
    assert graph["truncated"] is False


def test_an_expert_tells_the_merges_of_each_of_its_revisions(ann, pair) -> None:
    old, both = head(pair[0]), merge_of(pair)
    hf.put(ann[0], pair[0], {"README.md": tiny.card("Another card.")})
    new, alone = head(pair[0]), merge_of(pair[:1])
    path = "/api/v1/experts/ann/first/lineage"
    graph = hf.Caller().get(path).json()
    assert names(graph) == {
        f"base:{tiny.BASE}",
        f"ann/first@{old}",
        f"ann/first@{new}",
        both.full_name,
        alone.full_name,
    }
    merged = {(edge["origin"], edge["target"]) for edge in graph["edges"] if edge["kind"] == "merged_into"}
    assert merged == {(f"ann/first@{old}", both.full_name), (f"ann/first@{new}", alone.full_name)}
    pinned = hf.Caller().get(f"{path}?revision={old}").json()
    assert names(pinned) == {f"base:{tiny.BASE}", f"ann/first@{old}", both.full_name}
    assert names(hf.Caller().get(f"{path}?revision=main").json()) == {
        f"base:{tiny.BASE}",
        f"ann/first@{new}",
        alone.full_name,
    }
    assert hf.Caller().get(f"{path}?revision=nothing").status_code == 404


def test_a_hidden_parent_appears_in_no_lineage(ann, pair) -> None:
    merge, alone = merge_of(pair), merge_of(pair[:1])
    stranger = hf.person("rob")[1]
    experts.change_visibility(user=ann[0], expert=pair[1], visibility="private")
    assert stranger.get(f"/api/v1/merges/{merge.pk}/lineage").status_code == 404
    assert stranger.get("/api/v1/experts/ann/second/lineage").status_code == 404
    seen = stranger.get("/api/v1/experts/ann/first/lineage")
    assert names(seen.json()) == {f"base:{tiny.BASE}", f"ann/first@{head(pair[0])}", alone.full_name}
    assert b"second" not in seen.body
    assert merge.pk.encode() not in seen.body
    assert merge.full_name in names(ann[1].get("/api/v1/experts/ann/first/lineage").json())
    absent = stranger.get("/api/v1/experts/ann/nothing/lineage")
    hidden = stranger.get("/api/v1/experts/ann/second/lineage")
    assert (absent.json()["code"], absent.status_code) == (hidden.json()["code"], hidden.status_code)
    assert lineage.of_merge(merge, None).nodes == {}


def test_a_yanked_parent_marks_itself_and_the_merge(ann, pair) -> None:
    merge = merge_of(pair)
    Expert.objects.filter(pk=pair[0].pk).update(yanked_at=timezone.now())
    graph = hf.Caller().get(f"/api/v1/merges/{merge.pk}/lineage").json()
    assert {node["name"] for node in graph["nodes"] if node["yanked"]} == {"ann/first", merge.full_name}


def test_a_large_lineage_ends_with_the_newest_and_says_so(
    ann, pair, monkeypatch, django_assert_max_num_queries
) -> None:
    monkeypatch.setattr(lineage, "MOST_NODES", 5)
    extra = [ready(ann[0], f"more-{n}", tiny.lora(seed=n)) for n in range(5)]
    made = [merge_of([pair[0], other]) for other in extra]
    for age, merge in enumerate(made):
        Merge.objects.filter(pk=merge.pk).update(created_at=timezone.now() - timedelta(days=age))
    with django_assert_max_num_queries(12):
        graph = hf.Caller().get("/api/v1/experts/ann/first/lineage").json()
    assert graph["truncated"] is True
    assert names(graph) == {f"base:{tiny.BASE}", f"ann/first@{head(pair[0])}", *(row.full_name for row in made[:3])}
    assert {edge["origin"] for edge in graph["edges"]} | {edge["target"] for edge in graph["edges"]} <= names(graph)


def test_layers_go_from_the_base_to_the_merge(ann, pair) -> None:
    graph = lineage.of_merge(merge_of(pair), ann[0])
    columns = [[node.name for node in layer] for layer in lineage.layers(graph)]
    assert columns == [[tiny.BASE], ["ann/first", "ann/second"], [Merge.objects.get().full_name]]


def test_the_record_beside_a_result_names_all_it_was_made_of_by_digest(ann, pair) -> None:
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    record = json.loads(result(merge)["lineage.json"])
    by_name = {row["expert"]: row for row in record["parents"]}
    for name, files in {"ann/first": FIRST, "ann/second": SECOND}.items():
        assert by_name[name]["weights_sha256"] == hf.sha256(files["adapter_model.safetensors"])
        assert by_name[name]["config_sha256"] == hf.sha256(files["adapter_config.json"])
    assert (record["recipe_digest"], record["commit"]) == (merge.recipe_id, merge.commit)
    assert (record["method"], record["method_version"], record["base_weights"]) == ("linear", 1, None)
    assert {"numpy", "python", "moerge", "device"} <= set(record["environment"])


def test_a_card_is_written_from_the_recipe_alone(ann) -> None:
    share_alike = tiny.card(license="cc-by-sa-4.0 | <b>", moerge={"task": "Tea."})
    ready(ann[0], "first", {**FIRST, "README.md": tiny.card(license="apache-2.0")})
    ready(ann[0], "second", {**SECOND, "README.md": share_alike})
    body = recipe(method="ties", parameters={"density": 0.4}, acknowledge_licences=True)
    merge = compute(merges.register(user=ann[0], body=body)[0])
    card = result(merge)["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == tiny.BASE
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "peft"
    assert front["license"] == merge.licence["licence"]
    assert front["tags"] == ["moerge", "merge", "ties"]
    for parent in MergeParent.objects.select_related("revision__expert__namespace"):
        row = f"| {parent.weight:g} | {parent.revision.expert.full_name} | `{parent.revision.commit}` |"
        assert row in card
    assert "cc-by-sa-4.0 / (b) |" in card
    assert "<b>" not in card
    assert "`ties`, version 1, arXiv 2306.01708" in card
    assert "- density: `0.4`" in card
    assert f'PeftModel.from_pretrained(base, "{merge.full_name}", revision="{merge.commit}")' in card
    assert f"moerge pull {merge.full_name}" in card
    assert f"$HUB/{merge.full_name}/resolve/{merge.commit}/adapter_model.safetensors" in card
    for reason in merge.licence["reasons"]:
        assert reason["detail"].split("|")[0].strip()[:40] in card
    assert "**Look at the licences" in card
    for figure in ("energy kept", str(merge.report["energy_kept"]), merge.report["self_check"]["peft"]):
        assert figure not in card


def test_a_published_merge_has_passed_its_check(ann, pair) -> None:
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    told = merge.report["self_check"]
    assert (told["state"], told["modules"]) == ("passed", 2)
    assert told["largest_relative_error"] < 1e-12
    assert json.loads(result(merge)["report.json"])["self_check"] == told


def test_a_merge_that_does_not_load_as_computed_fails_and_publishes_nothing(ann, pair, monkeypatch) -> None:
    from moerge.tensors import saving

    right = saving.save_lora

    def wrong(folder, modules, **options):
        """What a bug in writing would do: the sign of one factor."""
        right(folder, {name: (-B if name == tiny.QUERY else B, A) for name, (B, A) in modules.items()}, **options)

    monkeypatch.setattr(saving, "save_lora", wrong)
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    assert merge.state == Merge.State.FAILED
    error = merge.jobs.get().error
    assert error["code"] == "merge-self-check-failed"
    assert error["errors"][0]["pointer"] == tiny.QUERY
    assert error["errors"][0]["met"] == "a relative error of 2"
    assert not Revision.objects.filter(merge=merge).exists()
