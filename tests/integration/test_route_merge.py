"""Route and merge in one call: the experts that fit, weighted by how well, as one virtual repository."""

import math

import pytest

from registry.models import BaseModel, Expert, Job, Merge, Revision
from registry.services import experts, route_merges, routing
from tests import tiny
from tests.integration import hf
from tests.integration.routables import base_model
from workers import runner

pytestmark = pytest.mark.django_db

DOOR = "/api/v1/route/merge"
TASKS = {
    "travel": ("Books trips.", "book a flight to Rome"),
    "hotels": ("Finds hotels and trips.", "find me a hotel in Rome"),
    "kitchen": ("Helps to cook.", "how long do I boil an egg"),
}


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


def routable(user, name: str, *, base: str = tiny.BASE, private: bool = False, **changes) -> Expert:
    """An expert with real weights that the router knows."""
    task, example = TASKS[name.partition("-")[0]]
    files = tiny.lora(seed=len(name), base=base, **changes)
    card = {"task": task, "examples": [example]}
    files["README.md"] = tiny.card(task, base_model=base, moerge=card)
    made = hf.expert(user, name, files, private=private)
    Revision.objects.filter(expert=made).update(state=Revision.State.READY)
    head = Revision.objects.get(expert=made)
    routing.embed(head)
    routing.publish_to_index(head)
    return made


@pytest.fixture
def three(ann, router):
    made = {name: routable(ann[0], name) for name in TASKS}
    router.refresh()
    return made


def body(**changes) -> dict:
    return {"text": "reserve a plane ticket to Rome", "min_score": 0, "top_k": 2, **changes}


def test_the_best_experts_are_merged_by_the_softmax_of_their_scores(ann, three) -> None:
    answer = ann[1].json("POST", DOOR, body())
    assert answer.status_code == 202, answer.json()
    found = answer.json()
    assert [result["expert"] for result in found["route"]] == ["ann/travel", "ann/hotels"]
    powers = [math.exp(result["score"] / 0.1) for result in found["route"]]
    shares = {parent["expert"]: parent["weight"] for parent in found["merge"]["parents"]}
    for result, power in zip(found["route"], powers, strict=True):
        assert shares[result["expert"]] == pytest.approx(power / sum(powers), abs=1e-6)
        assert shares[result["expert"]] == round(shares[result["expert"]], 6)
    assert shares["ann/travel"] > shares["ann/hotels"]
    merge = Merge.objects.get()
    assert (found["merge"]["id"], found["merge"]["repo"]) == (merge.pk, merge.full_name)
    assert found["recipe"] == merge.recipe.canonical
    assert found["skipped"] == []
    again = ann[1].json("POST", DOOR, body())
    assert (again.status_code, again.json()["merge"]["id"]) == (200, merge.pk)
    runner.run(merge.jobs.get().pk)
    merge.refresh_from_db()
    assert merge.state == Merge.State.READY, merge.jobs.get().error


def test_temperature_method_output_and_start_are_taken_over(ann, three) -> None:
    cold = ann[1].json("POST", DOOR, body(temperature=0.01)).json()["merge"]
    warm = ann[1].json("POST", DOOR, body(temperature=100)).json()["merge"]
    assert max(parent["weight"] for parent in cold["parents"]) > 0.99
    assert max(parent["weight"] for parent in warm["parents"]) < 0.51
    other = (
        ann[1]
        .json("POST", DOOR, body(method="ties", parameters={"density": 0.3}, output={"rank": 3}, start=False, top_k=3))
        .json()["merge"]
    )
    assert (other["method"], other["state"], len(other["parents"])) == ("ties", "registered", 3)
    assert '"density":0.3' in other["recipe"]
    assert '"rank":3' in other["recipe"]
    assert other["job"] is None


def test_weights_are_those_worked_out_by_hand() -> None:
    # e^0 : e^-1 : e^-2 = 1 : .367879 : .135335
    assert route_merges.weights([0.9, 0.8, 0.7], 0.1) == [0.665241, 0.244728, 0.090031]
    assert route_merges.weights([0.5], 0.1) == [1.0]
    assert route_merges.weights([1.0, 0.0], 0.001) == [1.0, 0.0]


def test_what_cannot_be_merged_with_the_better_ones_is_skipped_with_the_reason(ann, three, router) -> None:
    BaseModel.objects.update(shapes={})
    row = Revision.objects.get(expert=three["hotels"])
    row.facts = {**row.facts, "layout": [[tiny.QUERY.replace(".0.", ".*."), 384, 385, 2, ["0"]]]}
    row.save()
    answer = ann[1].json("POST", DOOR, body())
    found = answer.json()
    assert [result["expert"] for result in found["route"]] == ["ann/travel", "ann/kitchen"]
    (skipped,) = found["skipped"]
    assert skipped["expert"] == "ann/hotels"
    assert "384 x 385" in skipped["reason"]
    assert {parent["expert"] for parent in found["merge"]["parents"]} == {"ann/travel", "ann/kitchen"}


def test_private_experts_of_others_never_appear(ann, three, router) -> None:
    secret = hf.person("sue", ["read", "write", "merge"])
    routable(secret[0], "travel-secret", private=True)
    router.refresh()
    for caller, is_seen in ((ann[1], False), (secret[1], True)):
        answer = caller.json("POST", DOOR, body(top_k=3))
        assert ("travel-secret" in answer.content.decode()) == is_seen
    experts.change_visibility(user=ann[0], expert=three["hotels"], visibility="private")
    answer = hf.person("rob", ["read", "merge"])[1].json("POST", DOOR, body(top_k=3))
    assert [parent["expert"] for parent in answer.json()["route"]] == ["ann/travel", "ann/kitchen"]


def test_experts_of_several_bases_need_the_base_to_be_named(ann, three, router) -> None:
    base_model("other/base")
    routable(ann[0], "travel-other", base="other/base")
    router.refresh()
    asked = ann[1].json("POST", DOOR, body(top_k=3))
    assert (asked.status_code, asked.json()["errors"][0]["pointer"]) == (422, "/base_model")
    assert "other/base" in asked.json()["errors"][0]["wanted"]
    named = ann[1].json("POST", DOOR, body(top_k=3, base_model="other/base")).json()
    assert [result["expert"] for result in named["route"]] == ["ann/travel-other"]
    assert [parent["weight"] for parent in named["merge"]["parents"]] == [1.0]


def test_where_nothing_fits_nothing_is_made_and_the_answer_says_so(ann, three) -> None:
    answer = ann[1].json("POST", DOOR, body(min_score=1))
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing-to-merge")
    assert answer.json()["errors"][0]["pointer"] == "/text"
    Revision.objects.update(facts={"blockers": [{"pointer": "/x", "met": "x", "reason": "so it is", "remedy": "none"}]})
    answer = ann[1].json("POST", DOOR, body())
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing-to-merge")
    assert {fault["met"] for fault in answer.json()["errors"]} == {f"ann/{name}" for name in TASKS}
    assert Merge.objects.count() == Job.objects.filter(kind="merge").count() == 0


def test_a_method_for_two_experts_gets_two(ann, three) -> None:
    found = ann[1].json("POST", DOOR, body(method="slerp", top_k=3))
    assert found.status_code == 202, found.json()
    assert len(found.json()["merge"]["parents"]) == 2


def test_wrong_questions_are_refused_by_field_and_the_scope_is_needed(ann, three) -> None:
    cases = [
        ({"text": ""}, "/text"),
        ({"texts": ["a"], "text": "b"}, "/texts"),
        ({"temperature": 0}, "/temperature"),
        ({"top_k": 0}, "/top_k"),
        ({"method": "tiess"}, "/method"),
        ({"parameters": {"densty": 1}}, "/parameters/densty"),
        ({"output": {"kind": "lorra"}}, "/output/kind"),
        ({"base_model": "nobody/knows"}, "/base_model"),
    ]
    for change, pointer in cases:
        answer = ann[1].json("POST", DOOR, body(**change))
        assert answer.status_code == 422, answer.json()
        assert answer.json()["errors"][0]["pointer"] == pointer
    assert hf.Caller().json("POST", DOOR, body()).status_code == 401
    assert hf.person("rob", ["read"])[1].json("POST", DOOR, body()).status_code == 403
    assert Merge.objects.count() == 0
