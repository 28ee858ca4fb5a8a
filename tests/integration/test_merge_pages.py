"""The merge form with its check, and the page of a merge: what it tells, what it lets do, and to whom."""

import json
import re
from urllib.parse import parse_qs, urlparse

import pytest
from django.test import Client

from registry import jobs
from registry.models import Expert, Job, Kinship, Merge, Revision, User
from registry.services import catalogues, experts, kinship, merges, recipes
from tests import tiny
from tests.integration import hf
from tests.integration.merges import FIRST, SECOND
from workers import runner

pytestmark = pytest.mark.django_db
FORM = {
    "base_model": tiny.BASE,
    "expert": ["ann/first", "ann/second"],
    "weight:ann/first": "0.7",
    "weight:ann/second": "-0.3",
    "method": "ties",
    "parameter:ties:density": "0.5",
    "parameter:ties:variant": "peft",
    "parameter:linear:normalize": "true",
}


@pytest.fixture
def ann() -> User:
    user, _ = hf.person("ann", ["read", "write", "merge"])
    catalogues.sync()
    for name, files in (("first", FIRST), ("second", SECOND)):
        hf.expert(user, name, files)
    Revision.objects.update(state=Revision.State.READY)
    return user


@pytest.fixture
def browser(ann: User) -> Client:
    found = Client()
    found.force_login(ann)
    return found


def text(answer) -> str:
    return answer.content.decode()


def registered(browser: Client, **changes) -> Merge:
    answer = browser.post("/merge", {**FORM, **changes})
    assert answer.status_code == 302, text(answer)
    return Merge.objects.get(pk=answer["Location"].rpartition("/")[2])


def test_the_form_becomes_the_recipe_of_the_chosen_method_alone(browser) -> None:
    merge = registered(browser)
    recipe = json.loads(merge.recipe.canonical)
    assert (recipe["method"], recipe["parameters"]["density"], recipe["parameters"]["variant"]) == ("ties", 0.5, "peft")
    assert {item["expert"]: item["weight"] for item in recipe["experts"]} == {"ann/first": 0.7, "ann/second": -0.3}


def test_the_check_stands_beside_the_form_and_registers_nothing(browser) -> None:
    page = text(browser.post("/merge/check", FORM))
    assert "Can be merged" in page
    # The second expert has one module of two; ranks 2 and 5 make 7 for a method whose result is dense.
    assert re.search(r"ann/second</td><td>lora</td><td>5</td><td>1</td><td title=\"[^\"]*query\">1</td>", page), page
    assert "lora, rank 7" in page
    assert page.count("apache-2.0") >= 2
    assert Merge.objects.count() == 0
    # Nobody has compared these two, so the page asks again while that is done.
    assert 'hx-post="/merge/check"' in page
    runner.run(Job.objects.get(kind="kinship").pk)
    page = text(browser.post("/merge/check", FORM))
    assert "hx-post" not in page
    assert "Sign conflict" in page


def test_a_refusal_of_the_check_names_the_field_and_the_remedy(browser) -> None:
    answer = browser.post("/merge/check", {**FORM, "parameter:ties:density": "0"})
    page = text(answer)
    assert answer.status_code == 200
    assert "/parameters/density" in page
    assert "more than 0" in page
    assert "Can be merged" not in page
    assert "Choose experts" in text(browser.post("/merge/check", {**FORM, "expert": []}))


def test_the_check_of_a_known_recipe_leads_to_it(browser) -> None:
    merge = registered(browser)
    assert f'href="/{merge.full_name}"' in text(browser.post("/merge/check", FORM))


def test_output_and_acknowledgement_of_the_form_arrive(browser) -> None:
    merge = registered(browser, energy="0.95", acknowledge="yes", dtype="bfloat16")
    assert '"rank":{"energy":0.95}' in merge.recipe.canonical
    assert '"dtype":"bfloat16"' in merge.recipe.canonical
    assert merge.licence["acknowledged"]["by"] == "ann"
    delta = registered(browser, kind="delta", method="linear")
    assert '"kind":"delta"' in delta.recipe.canonical


def test_the_page_tells_parents_graph_report_and_how_to_load_it(browser, client) -> None:
    merge = registered(browser)
    moving = text(client.get(f"/{merge.full_name}"))
    assert "hx-get" in moving
    runner.run(merge.jobs.get().pk)
    assert merge.jobs.get().state == Job.State.DONE, merge.jobs.get().error
    page = text(client.get(f"/{merge.full_name}"))
    assert "hx-get" not in page
    for part in ("ann/first to merges/", ", 0.7", ", -0.3", "Energy kept", "PeftModel.from_pretrained", "moerge pull"):
        assert part in page, part
    head = Revision.objects.get(expert__name="first")
    assert f'href="/ann/first/tree/{head.commit}"' in page


def test_the_page_of_an_expert_shows_what_it_went_into(browser, client, ann) -> None:
    merge = registered(browser)
    page = text(client.get("/ann/first"))
    assert f"ann/first to {merge.full_name}, 0.7" in page
    experts.change_visibility(user=ann, expert=Expert.objects.get(name="second"), visibility="private")
    assert merge.full_name not in text(client.get("/ann/first"))
    assert merge.full_name in text(browser.get("/ann/first"))


def test_kinship_that_was_measured_is_on_the_page(browser, client) -> None:
    merge = registered(browser)
    assert "Sign conflict" not in text(client.get(f"/{merge.full_name}"))
    digests = [recipes.content_digest(parent.revision) for parent in merge.parents.all()]
    figures = {"cosine": 0.125, "pearson": 0.1, "distance": 3.5, "conflict": 0.4375}
    kinship.record({kinship.pair_of(*digests): figures})
    page = text(client.get(f"/{merge.full_name}"))
    assert Kinship.objects.count() == 1
    assert "0.125" in page
    assert "43.8 %" in page


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dare", "parameter:dare:density": "0.25", "seed": "7"},
        {"energy": "0.9"},
        {"rank": "3", "kind": "lora"},
        {"method": "linear", "parameter:linear:normalize": "false", "kind": "delta"},
    ],
)
def test_changing_a_recipe_begins_with_the_same_recipe(browser, client, changes) -> None:
    merge = registered(browser, **changes)
    (link,) = re.findall(r'href="(/merge\?[^"]+)"', text(client.get(f"/{merge.full_name}")))
    fields = parse_qs(urlparse(link.replace("&amp;", "&")).query, keep_blank_values=True)
    form = text(browser.get(f"/merge?{urlparse(link.replace('&amp;', '&')).query}"))
    assert form.count(" checked") >= 3  # both experts and the method
    assert registered(browser, **{name: value for name, value in fields.items() if name != "expert"}).pk == merge.pk


def test_only_who_asked_for_a_merge_may_stop_it(browser, ann) -> None:
    merge = registered(browser)
    assert "Stop" in text(browser.get(f"/{merge.full_name}"))
    stranger = Client()
    stranger.force_login(hf.person("rob")[0])
    assert "Stop" not in text(stranger.get(f"/{merge.full_name}"))
    assert stranger.post(f"/{merge.full_name}/change", {"action": "cancel"}).status_code == 403
    assert merge.jobs.get().state == Job.State.QUEUED
    assert browser.post(f"/{merge.full_name}/change", {"action": "cancel"}).status_code == 302
    assert merge.jobs.get().state == Job.State.CANCELLED


def test_a_merge_that_sleeps_says_so_and_is_started_by_a_reader(browser, ann, client) -> None:
    merge, _ = merges.register(
        user=ann, body={"method": "linear", "experts": [{"expert": "ann/first", "weight": 1}]}, start=False
    )
    page = text(browser.get(f"/{merge.full_name}"))
    assert "computed when somebody reads it" in page
    assert "Compute it now" in page
    assert "Compute it now" not in text(client.get(f"/{merge.full_name}"))
    browser.post(f"/{merge.full_name}/change", {"action": "start"})
    assert merge.jobs.get().state == Job.State.QUEUED
    jobs.cancel(merge.jobs.get())


def test_a_hidden_parent_hides_page_check_and_buttons(browser, ann) -> None:
    merge = registered(browser)
    experts.change_visibility(user=ann, expert=Expert.objects.get(name="second"), visibility="private")
    stranger = Client()
    stranger.force_login(hf.person("rob")[0])
    assert stranger.get(f"/{merge.full_name}").status_code == 404
    assert stranger.post(f"/{merge.full_name}/change", {"action": "start"}).status_code == 404
    refused = text(stranger.post("/merge/check", FORM))
    assert "Can be merged" not in refused
    assert "/experts/1/expert" in refused
