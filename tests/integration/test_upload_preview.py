"""What the upload page tells of a card before it is uploaded: quality to expect, and where its examples would go."""

import html
import re

import pytest
from django.test import Client

from registry.models import Embedding, Expert, RoutingChange
from registry.services import previews
from tests import tiny
from tests.integration import hf
from tests.integration.routables import person, published

pytestmark = pytest.mark.django_db
EXAMPLES = [
    "reserve a seat on the train to Bonn",
    "reserve two seats on the train to Kiel",
    "my card was declined again",
]


@pytest.fixture
def dora(router):
    """Somebody about to upload, on a base with two experts that everybody sees and one that only carl does."""
    published("ann/kitchen", "Helps to cook.", "how long do I boil an egg")
    published("bob/bank", "Questions on money.", "my card was declined", "what is my balance")
    published("carl/secret", "Cards that are declined.", EXAMPLES[2], private=True)
    router.refresh()
    browser = Client()
    browser.force_login(person("dora"))
    return browser


def told(browser: Client, **fields: str) -> str:
    answer = browser.post("/upload/preview", {"owner": "dora", "name": "trains", "base_model": "base/one", **fields})
    assert answer.status_code == 200
    return " ".join(html.unescape(answer.content.decode()).split())


def marked(text: str) -> list[str]:
    """The rows of the table of levels that are marked as this card's."""
    found = re.findall(r'<tr class="own" aria-current="true"><th scope="row">(.*?)</th>', text)
    return [" ".join(row.split()) for row in found]


def standings(text: str) -> list[str]:
    items = re.findall(r"<li><q>(.*?)</li>", text)
    return [" ".join(re.sub(r"<[^>]+>", " ", item).split()) for item in items]


def test_each_example_has_its_rank_and_who_comes_before(dora) -> None:
    text = told(dora, description="Books seats on trains.", examples="\r\n".join([*EXAMPLES, " "]))
    first, second, third = standings(text)
    assert first.startswith(f"{EXAMPLES[0]} yes score 0.")
    assert second.startswith(f"{EXAMPLES[1]} yes score 0.")
    assert re.fullmatch(rf"{EXAMPLES[2]} rank 2 after bob/bank 0\.\d\d score 0\.\d\d", third)
    assert "Would be routed here: 2 of 3 examples" in text
    assert "secret" not in text
    body = {
        "base_model": "base/one", "name": "dora/trains", "description": "Books seats on trains.", "examples": EXAMPLES,
    }  # fmt: skip
    answer = hf.Caller().json("POST", "/api/v1/route/preview", body).json()
    assert [f"{row['score']:.2f}" for row in answer["texts"]] == [
        row.rpartition(" ")[2] for row in (first, second, third)
    ]
    # Nothing of it is kept.
    assert Expert.objects.filter(namespace__name="dora").count() == 0
    assert RoutingChange.objects.count() == 3
    assert Embedding.objects.filter(revision__expert__namespace__name="dora").count() == 0


@pytest.mark.parametrize(
    ("count", "quality", "row"), [(0, "low", "0"), (1, "fair", "1"), (4, "fair", "3"), (5, "good", "5 or more")]
)
def test_the_quality_to_expect_follows_the_number_of_examples(dora, count, quality, row) -> None:
    text = told(dora, examples="\n".join(f"train number {place}" for place in range(count)))
    assert re.search(rf'Routing quality to expect: <span class="badge \w+">{quality}</span>', text)
    assert marked(text) == [row]
    # The measured figures of every level stand there, so that a contributor sees what more examples bring.
    for _, first, fifth in previews.LEVELS:
        assert f"<td>{100 * first:.4g} %</td><td>{100 * fifth:.4g} %</td>" in text


def test_what_the_form_leaves_open_is_what_the_files_say(dora) -> None:
    readme = "---\nmoerge:\n  task: Books seats on trains.\n  examples: [is the train to Bonn late]\n---\nWords.\n"
    text = told(dora, base_model="", detected_base="base/one", readme=readme)
    assert [row.partition(" first")[0] for row in standings(text)] == ["is the train to Bonn late"]
    assert standings(told(dora, readme=readme, examples=EXAMPLES[2]))[0].startswith(EXAMPLES[2])
    assert "name the base model" in told(dora, base_model="")


def test_what_is_wrong_is_shown_in_place(dora, settings) -> None:
    assert "base/none" in told(dora, base_model="base/none", examples="x")
    assert "/examples/0" in told(dora, examples="x" * 20_001)
    assert "at most 32" in told(dora, examples="x\n" * 33)
    broken = told(dora, readme="---\nmoerge: [\n---\n")
    assert 'role="alert"' in broken
    assert "Measured on 669 cards" in broken
    settings.HUB_ROUTER_URL = "http://127.0.0.1:9"
    assert "The router does not answer" in told(dora, examples="x")


def test_the_preview_is_for_people_signed_in_and_its_page_asks_for_it(dora) -> None:
    assert Client().post("/upload/preview", {}).status_code == 302
    assert dora.get("/upload/preview").status_code == 405
    page = dora.get("/upload").content.decode()
    assert 'hx-post="/upload/preview"' in page
    careful = Client(enforce_csrf_checks=True)
    careful.force_login(person("eve"))
    assert careful.post("/upload/preview", {}).status_code == 403
    script = told(dora, examples="<script>alert(1)</script>", name=tiny.BASE)
    assert "<q><script>" in script  # the text, unescaped once by this test
    assert b"<script>" not in dora.post("/upload/preview", {"base_model": "base/one", "examples": "<script>"}).content
