"""Previews: what routing to expect of a card before it is uploaded, from what the caller may see."""

import pytest

from registry.errors import BaseUnknown, IndexNotReady, QueryInvalid, TooLarge
from registry.models import Expert, RoutingChange
from registry.services import previews, routing
from registry.services.router import Router
from tests.integration.routables import expert, published, serving

pytestmark = pytest.mark.django_db

TRAVEL = ("book a flight to Rome", "book a cheap flight to Oslo", "I need to book a flight to Madrid")


@pytest.fixture
def experts(router):
    made = {
        "kitchen": published("ann/kitchen", "Helps to cook.", "how long do I boil an egg", "what can I use for salt"),
        "bank": published("bob/bank", "Questions on money.", "my card was declined", "what is my balance"),
        "secret": published("carl/secret", "Books trips.", *TRAVEL, private=True),
        "other": published("bob/travel-other", "Books trips.", *TRAVEL, base="base/two"),
    }
    router.refresh()
    return made


def preview(viewer=None, **fields):
    return previews.preview(**{"viewer": viewer, "base_model": "base/one", "name": "travel", **fields})


def test_a_draft_alone_in_its_field_would_get_its_own_examples(experts):
    met = preview(description="Books trips.", examples=TRAVEL)
    assert (met["quality"], met["expected"]["examples"], met["routed"], met["index_seq"]) == ("fair", 3, 3, 4)
    for index, text in enumerate(met["texts"]):
        assert (text["index"], text["rank"], text["would_be_routed"], text["winners"]) == (index, 1, True, [])
        assert 0 < text["score"] < 1


def test_a_draft_stands_as_the_uploaded_card_without_the_example_would(experts, router):
    examples = TRAVEL[:2]
    met = preview(description="Books trips.", examples=examples)["texts"][0]
    published("dora/travel", "Books trips.", examples[1])
    router.refresh()
    answer = routing.route(viewer=None, text=examples[0], base_model="base/one", min_score=0)
    first = answer["results"][0]
    assert (first["expert"], met["rank"]) == ("dora/travel", 1)
    assert met["score"] == pytest.approx(first["score"], abs=1e-5)


def test_whoever_comes_before_is_named_with_the_score_that_beats_the_draft(experts):
    met = preview(name="misc", description="Miscellaneous.", examples=["my card was declined again", *TRAVEL])
    text = met["texts"][0]
    assert text["winners"][0]["expert"] == "bob/bank"
    assert text["winners"][0]["score"] >= text["score"]
    assert text["rank"] == 1 + len(text["winners"]) > 1
    assert text["would_be_routed"] is False


def test_a_hidden_expert_is_neither_named_nor_counted(experts):
    draft = {"description": "Money matters.", "name": "money", "examples": ["book a flight to Rome tomorrow"]}
    assert "carl/secret" not in str(preview(**draft))
    carl = Expert.objects.get(name="secret").namespace.members.get()
    mine = preview(carl, **draft)["texts"][0]
    assert mine["winners"][0]["expert"] == "carl/secret"
    assert preview(**draft)["texts"][0]["rank"] < mine["rank"]
    Expert.objects.filter(name="bank").update(visibility=Expert.Visibility.PRIVATE)
    assert "bob/bank" not in str(preview(name="misc", examples=["my card was declined again"]))


def test_a_draft_does_not_compete_with_the_expert_it_replaces(experts):
    examples = ["how long do I boil an egg", "what can I use for salt"]
    assert preview(name="kitchen", examples=examples)["texts"][0]["winners"][0]["expert"] == "ann/kitchen"
    assert "ann/kitchen" not in str(preview(name="ann/kitchen", examples=examples))


@pytest.mark.parametrize(
    ("count", "quality", "level"), [(0, "low", 0), (1, "fair", 1), (4, "fair", 3), (5, "good", 5), (32, "good", 5)]
)
def test_quality_is_told_by_the_number_of_examples(experts, count, quality, level):
    met = preview(description="d", examples=[f"text {number}" for number in range(count)])
    assert (met["quality"], met["expected"]["examples"], len(met["texts"])) == (quality, level, count)
    assert met["expected"] in met["levels"]
    assert [one["recall_1"] for one in met["levels"]] == sorted(one["recall_1"] for one in met["levels"])
    assert all(one["recall_1"] < one["recall_5"] < 1 for one in met["levels"])


def test_a_preview_leaves_no_trace(experts, router):
    before = (Expert.objects.count(), RoutingChange.objects.count(), router.state)
    preview(description="Books trips.", examples=TRAVEL, instruction="Book it.", tags=["travel"])
    assert (Expert.objects.count(), RoutingChange.objects.count(), router.state) == before


def test_on_a_base_without_experts_every_draft_is_first(experts):
    expert("dora/x", base="base/new")
    text = preview(base_model="base/new", description="Books trips.", examples=TRAVEL)["texts"][0]
    assert (text["rank"], text["winners"]) == (1, [])


WRONG = {
    "unknown base": ({"base_model": "base/none"}, BaseUnknown, "/base_model"),
    "blank example": ({"examples": ["a", " \n"]}, QueryInvalid, "/examples/1"),
    "33 examples": ({"examples": ["a"] * 33}, QueryInvalid, "/examples"),
    "long example": ({"examples": ["x" * 20_001]}, TooLarge, "/examples/0"),
    "long description": ({"description": "x" * 20_001}, TooLarge, "/description"),
    "long instruction": ({"instruction": "x" * 20_001}, TooLarge, "/instruction"),
    "no name": ({"name": " "}, QueryInvalid, "/name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_draft_that_breaks_a_rule_is_refused_with_its_field(experts, name):
    fields, error, pointer = WRONG[name]
    with pytest.raises(error) as caught:
        preview(**fields)
    assert caught.value.faults[0].pointer == pointer
    assert caught.value.faults[0].wanted


def test_while_the_encoder_loads_there_is_no_preview(experts, settings):
    bare = Router()
    bare.refresh()
    with serving(bare) as url:
        settings.HUB_ROUTER_URL = url
        with pytest.raises(IndexNotReady) as caught:
            preview(examples=TRAVEL)
    assert caught.value.retry_after_seconds


def test_the_door_takes_json_from_anybody_and_refuses_unknown_fields(experts, client):
    body = {"base_model": "base/one", "name": "travel", "description": "Books trips.", "examples": list(TRAVEL)}
    met = client.post("/api/v1/route/preview", body, content_type="application/json")
    assert (met.status_code, met.json()["routed"]) == (200, 3)
    for wrong, pointer in (({"example": []}, "/example"), ({"examples": ["x"] * 33}, "/examples")):
        refused = client.post("/api/v1/route/preview", {**body, **wrong}, content_type="application/json")
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)
