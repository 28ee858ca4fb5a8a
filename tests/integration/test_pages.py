"""Pages over the database: who sees what, and that nothing a contributor writes can run in a reader's browser."""

import pytest
from django.test import Client

from registry.models import AuditEvent, Expert, Merge, User
from tests import factories, tiny
from tests.integration import hf

pytestmark = pytest.mark.django_db
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def ann() -> User:
    return factories.user("ann")


@pytest.fixture
def browser(ann: User) -> Client:
    found = Client()
    found.force_login(ann)
    return found


def text(answer) -> str:
    return answer.content.decode()


def test_the_expert_page_shows_facts_files_and_card(ann, client) -> None:
    made = factories.revision(ann, factories.expert(ann, "tea"))
    page = text(client.get("/ann/tea"))
    for part in (
        tiny.BASE,
        "adapter_model.safetensors",
        made.commit[:12],
        "About tea.",
        "Is tea number 3 a green one?",
    ):
        assert part in page
    assert 'hx-get="/ann/tea/status"' in page  # it asks again while its jobs run
    factories.ready(made)
    assert "hx-get" not in text(client.get("/ann/tea/status"))


def test_what_a_contributor_writes_is_text_and_never_code(ann, client) -> None:
    body = f"{SCRIPT}\n\n[click](javascript:alert(1))\n\n<img src=x onerror=alert(1)>\n"
    card = tiny.card(f"Tea {SCRIPT}", license="<b>mit</b>") + body.encode()
    factories.revision(ann, factories.expert(ann, "tea"), tiny.adapter(**{"README.md": card}))
    answer = client.get("/ann/tea")
    page = text(answer)
    assert SCRIPT not in page
    assert 'href="javascript' not in page
    assert "onerror=alert" not in page.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    assert "&lt;script&gt;alert(1)" in page
    assert "script-src 'self'" in answer["Content-Security-Policy"]
    assert answer["X-Content-Type-Options"] == "nosniff"


def test_a_private_expert_has_no_page_for_others(ann, browser, client) -> None:
    factories.revision(ann, factories.expert(ann, "secret", private=True))
    assert browser.get("/ann/secret").status_code == 200
    assert client.get("/ann/secret").status_code == client.get("/ann/secret/status").status_code == 404
    assert "secret" not in text(client.get("/ann"))


def test_the_owner_changes_visibility_yanks_and_deletes_and_nobody_else_does(ann, browser) -> None:
    factories.expert(ann, "tea")
    stranger = Client()
    stranger.force_login(factories.user("rob"))
    assert stranger.post("/ann/tea/change", {"action": "private"}).status_code == 403
    assert Client().post("/ann/tea/change", {"action": "private"}).status_code == 302
    assert Expert.objects.get().visibility == "public"
    browser.post("/ann/tea/change", {"action": "private"})
    assert Expert.objects.get().visibility == "private"
    browser.post("/ann/tea/change", {"action": "yank", "reason": "wrong labels"})
    assert Expert.objects.get().yank_reason == "wrong labels"
    assert browser.post("/ann/tea/change", {"action": "delete", "confirm": "tea"}).status_code == 403
    browser.post("/ann/tea/change", {"action": "delete", "confirm": "ann/tea"})
    assert Expert.objects.get().deleted_at is not None
    assert AuditEvent.objects.filter(action__startswith="expert.").count() >= 3


def test_a_form_without_the_csrf_token_changes_nothing(ann) -> None:
    factories.expert(ann, "tea")
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(ann)
    assert browser.post("/ann/tea/change", {"action": "private"}).status_code == 403
    assert Expert.objects.get().visibility == "public"


def test_the_merge_form_registers_a_recipe_and_explains_a_wrong_one(ann, browser) -> None:
    from django.core.management import call_command

    call_command("sync_catalogue", verbosity=0)
    for name in ("one", "two"):
        factories.ready(factories.revision(ann, factories.expert(ann, name)))
    form = {
        "base_model": tiny.BASE,
        "method": "ties",
        "expert": ["ann/one", "ann/two"],
        "weight:ann/one": "0.7",
        "weight:ann/two": "-0.3",
    }
    offered = text(browser.get("/merge?expert=ann/one"))
    assert 'value="knots"' in offered
    # Fisher merging takes statistics that lie beside the experts; these have none.
    assert 'value="fisher"' in offered
    assert "fisher_diag of every expert" in text(browser.post("/merge/check", {**form, "method": "fisher"}))
    wrong = browser.post("/merge", {**form, "parameter:ties:density": "1.5"})
    assert wrong.status_code == 422
    for part in ("/parameters/density", "1.5", "more than 0 and at most 1"):
        assert part in text(wrong)
    assert Merge.objects.count() == 0
    made = browser.post("/merge", {**form, "parameter:ties:density": "0.5", "parameter:dare:density": "0.1"})
    merge = Merge.objects.get()
    assert (made.status_code, made["Location"]) == (302, f"/merges/{merge.pk}")
    assert sorted(merge.parents.values_list("revision__expert__name", "weight")) == [("one", 0.7), ("two", -0.3)]
    assert '"density":0.5' in merge.recipe.canonical
    page = text(browser.get(f"/merges/{merge.pk}"))
    assert "queued" in page
    assert f'hx-get="/merges/{merge.pk}/status"' in page


def test_joining_makes_an_account_with_a_namespace_and_refuses_look_alikes(client) -> None:
    assert client.post("/join", {"name": "My-LoRA", "password": "correct horse battery"}).status_code == 302
    other = Client().post("/join", {"name": "my_l0ra", "password": "correct horse battery"})
    assert other.status_code == 409
    assert "taken" in text(other)
    weak = Client().post("/join", {"name": "bob", "password": "password"})
    assert weak.status_code == 422
    assert User.objects.count() == 1


def test_too_many_wrong_passwords_close_the_door_for_a_while(ann, client, settings) -> None:
    from django.core.cache import cache

    cache.clear()
    settings.HUB_RATE_LIMITS = True
    settings.HUB_RATE_LOGIN_PER_5_MINUTES = 3
    for _ in range(3):
        assert client.post("/login", {"username": "ann", "password": "wrong"}).status_code == 200
    refused = client.post("/login", {"username": "ann", "password": factories.PASSWORD})
    assert (refused.status_code, refused["Retry-After"]) == (429, "300")
    cache.clear()
    assert client.post("/login", {"username": "ann", "password": factories.PASSWORD}).status_code == 302


def test_a_key_is_shown_once(ann, browser) -> None:
    browser.post("/settings/keys", {"name": "laptop", "scope": ["read"]})
    page = text(browser.get("/settings"))
    secret = page.partition('id="secret">')[2].partition("<")[0]
    assert hf.Caller(secret).get("/api/whoami-v2").json()["name"] == "ann"
    assert secret not in text(browser.get("/settings"))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/search",
        "/docs",
        "/docs/errors",
        "/docs/api",
        "/login",
        "/join",
        "/upload",
        "/merge",
        "/settings",
        "/router",
    ],
)
def test_every_page_is_there_and_loads_nothing_from_elsewhere(path: str, browser) -> None:
    answer = browser.get(path)
    assert answer.status_code in {200, 302}
    for attribute in ('src="http', 'href="http', "url(http"):
        assert attribute not in text(answer).replace('href="https://arxiv.org', "")


def test_the_documentation_has_the_heading_that_a_problem_points_at(client) -> None:
    answer = client.get("/api/v1/experts/ann/nothing")
    page, _, anchor = answer.json()["type"].partition("#")
    assert f'id="{anchor}"' in text(client.get(page))
    assert client.get("/docs/..%2FREADME").status_code == 404
