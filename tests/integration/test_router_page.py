"""The router page: what it tells of an answer, what it refuses, and that nobody learns of hidden experts by it."""

import csv
import html
import io
import json
import re
import shlex
from urllib.parse import urlencode

import pytest
from django.test import Client

from registry.models import Expert, RoutingClock
from registry.services import catalogues, evaluations, routing
from tests.evaluated import FIGURES
from tests.integration import hf
from tests.integration.routables import base_model, person, published

pytestmark = pytest.mark.django_db
TRIP = "reserve a plane ticket to Rome"


@pytest.fixture
def experts(router):
    """Three experts on one base, one of them hidden, and one on another."""
    catalogues.sync()
    published(
        "ann/travel", "Books trips.", "book a flight to Rome", "find a hotel in Oslo", tags=("trips",), licence="mit"
    )
    published("bob/kitchen", "Helps to cook.", "how long do I boil an egg")
    published("carl/secret", "Books trips.", "book a flight to Rome", private=True)
    published("bob/other", "Books trips.", "book a flight to Rome", base="base/two")
    router.refresh()
    return {expert.full_name: expert for expert in Expert.objects.select_related("namespace")}


def address(path: str = "/router", **fields: str) -> str:
    return f"{path}?{urlencode(fields)}"


def page(client: Client, path: str = "/router", *, status: int = 200, **fields: str) -> str:
    answer = client.get(address(path, **fields))
    assert answer.status_code == status
    return answer.content.decode()


def rows(text: str) -> list[list[str]]:
    """The cells of the table of experts, tags taken away."""
    _, _, table = text.partition('<table class="routed">')
    found = re.findall(r"<tr>(.*?)</tr>", table.partition("</table>")[0], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in found]
    return [[" ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in row] for row in cells]


def threshold() -> str:
    """The strategy's own, among the experts of the first base."""
    return f"{routing.route(viewer=None, text=TRIP, base_model='base/one')['default_min_score']:.3f}"


def signed_in(expert: Expert) -> Client:
    browser = Client()
    browser.force_login(expert.namespace.members.get())
    return browser


def test_a_question_in_the_address_is_answered_with_every_part_of_the_scores(experts, client, encoder) -> None:
    text = page(client, q=TRIP, base_model="base/one", min_score="0", top_k="5")
    head, first, second = rows(text)
    assert head == [
        "Rank #",
        "Expert base model, licence",
        "Score",
        "s_ex",
        "s_desc",
        "s_cen",
        "bm25",
        "Nearest example",
    ]
    assert first[:2] == ["1", "ann/travel base/one · mit"]
    assert first[-1] == "book a flight to Rome"
    assert second[:2] == ["2", "bob/kitchen base/one · no licence stated"]
    (found,) = routing.route(viewer=None, text=TRIP, base_model="base/one", min_score=0, top_k=1)["results"]
    assert first[2] == f"{found['score']:.3f} {found['score']:.3f} {found['confidence']}"
    assert [float(cell) for cell in first[3:7]] == pytest.approx([found["parts"][name] for name in head[3:7]], rel=1e-3)
    query, example = encoder.encode([TRIP, "book a flight to Rome"])
    assert float(first[3]) == pytest.approx(float(query @ example), abs=1e-3)
    assert 'href="/ann/travel"' in text
    # The form stands as it was filled in, and the threshold is told beside the default.
    for part in ('value="base/one" selected', 'name="top_k" inputmode="numeric" value="5"', f">{TRIP}</textarea>"):
        assert part in text
    assert f"Threshold 0.000, the default here is {threshold()}" in text
    for name in ("hybrid", "bm25", "dense"):
        assert f"<option>{name}</option>" in text


def test_the_call_on_the_page_gives_the_same_answer(experts, client) -> None:
    tricky = """it's a "trip" to $HOME `ls` \\ <b>Zürich</b>"""
    text = page(client, q=tricky, base_model="base/one", min_score="0", strategy="dense", tag="trips", owner="ann")
    call = html.unescape(re.findall(r'<code id="call">(.*?)</code>', text, re.DOTALL)[0])
    words = shlex.split(call.replace("\\\n", ""))
    assert words[:2] == ["curl", "-s"]
    assert words[2].endswith("/api/v1/route")
    body = json.loads(words[words.index("-d") + 1])
    assert body == {
        "text": tricky, "base_model": "base/one", "strategy": "dense", "top_k": 10, "min_score": 0.0, "explain": True,
        "filters": {"owner": "ann", "tags": ["trips"]},
    }  # fmt: skip
    answer = hf.Caller().json("POST", "/api/v1/route", body).json()
    assert [(row["expert"], f"{row['score']:.3f}") for row in answer["results"]] == [
        (row[1].split()[0], row[2].split()[0]) for row in rows(text)[1:]
    ]
    assert answer["strategy"] == "dense"
    assert "HF_TOKEN" not in call
    assert "Bearer $HF_TOKEN" in html.unescape(page(signed_in(experts["ann/travel"]), q="x y"))


def test_an_answer_that_abstains_says_why_and_how_to_go_on(experts, client) -> None:
    text = page(client, q="zxqv wvut", base_model="base/one")
    told = re.search(rf"The best score is (0\.\d{{3}}), the threshold {threshold()}\.", text)
    assert told is not None
    assert "Say more of the task" in text
    link = html.unescape(re.findall(r'<a href="(/router\?[^"]+)">show them all', text)[0])
    assert rows(client.get(link).content.decode())[1][2].startswith(told[1])
    base_model("base/three")
    for fields in ({"base_model": "base/three"}, {"owner": "nobody"}, {"tag": "none such"}):
        assert "No expert to choose from." in page(client, q=TRIP, **fields)


BATCH = "fly to Rome\r\n\r\n  \n=1+1 boil an egg\nzxqv wvut"


def test_a_batch_has_a_row_for_each_line_and_comes_as_csv_and_json_lines(experts, client) -> None:
    text = page(client, q=BATCH, lines="on", base_model="base/one")
    _, first, second, third = rows(text)
    assert first[1:3] == ["fly to Rome", "ann/travel"]
    assert re.fullmatch(r"bob/kitchen 0\.\d{3}", first[4])
    assert second[1:3] == ["=1+1 boil an egg", "bob/kitchen"]
    assert re.fullmatch(rf"no expert best score 0\.\d{{3}}, threshold {threshold()}", third[2])
    form = dict(
        re.findall(
            r'<input type="hidden" name="(\w+)" value="([^"]*)">', text.partition('action="/router/download"')[2]
        )
    )
    sent = {name: html.unescape(value) for name, value in form.items() if name != "csrfmiddlewaretoken"}
    assert sent == {"q": BATCH.replace("\r\n", "\n"), "lines": "on", "base_model": "base/one"}
    table = client.post("/router/download", {**sent, "format": "csv"})
    assert 'filename="routed.csv"' in table["Content-Disposition"]
    assert table["Cache-Control"] == "private, no-store"
    read = list(csv.DictReader(io.StringIO(table.content.decode())))
    lines = [
        json.loads(line)
        for line in client.post("/router/download", {**sent, "format": "jsonl"}).content.decode().splitlines()
    ]
    assert [row["text"] for row in lines] == ["fly to Rome", "=1+1 boil an egg", "zxqv wvut"]
    # No table program takes the second for a formula.
    assert [row["text"] for row in read] == ["fly to Rome", "'=1+1 boil an egg", "zxqv wvut"]
    # The same by an address, for who keeps one.
    assert client.get(address("/router/download", format="csv", **sent)).content == table.content
    for kept, cells, row in zip(lines, read, (first, second, third), strict=True):
        assert cells["expert"] == (kept["expert"] or "")
        assert kept["abstained"] == (kept["expert"] is None) == (cells["abstained"] == "True")
        if kept["expert"]:
            assert f"{kept['score']:.3f}" == f"{float(cells['score']):.3f}" == row[3].split()[0]
            assert row[4].split() == [kept["second"], f"{kept['second_score']:.3f}"]


def test_a_hidden_expert_is_on_no_page_and_in_no_file_of_others(experts, client) -> None:
    fields = {"q": "book a flight to Rome", "base_model": "base/one", "min_score": "0"}
    everywhere = ["/router", "/router/answer", "/router/download"]
    for browser in (client, signed_in(experts["ann/travel"])):
        for path in everywhere:
            for more in ({}, {"lines": "on"}, {"format": "jsonl"}, {"owner": "carl"}):
                text = page(browser, path, **fields, **more)
                assert "secret" not in text, (path, more)
    own = signed_in(experts["carl/secret"])
    for path in everywhere:
        assert "carl/secret" in page(own, path, **fields)
    assert "private" in rows(page(own, **fields))[1][1] + rows(page(own, **fields))[2][1]
    # Whoever hides or deletes an expert takes it off the page at that moment.
    Expert.objects.filter(name="travel").update(visibility="private")
    assert "ann/travel" not in page(client, **fields)


def test_confusions_of_the_last_evaluation_name_only_what_the_reader_may_see(experts, client) -> None:
    RoutingClock.objects.update(seq=12)
    figures = {**FIGURES, "confusions": [
        {"gold": "carl/secret", "found": "ann/travel", "queries": 1},
        {"gold": "bob/kitchen", "found": "ann/travel", "queries": 1},
    ]}  # fmt: skip
    carl = experts["carl/secret"].namespace.members.get()
    evaluations.publish(user=carl, base_model="base/one", strategy="hybrid", index_seq=12, figures=figures)
    text = page(client, base_model="base/one")
    assert "secret" not in text
    assert "bob/kitchen</a> taken for" in text
    assert "carl/secret</a> taken for" in page(signed_in(experts["carl/secret"]))
    # Five bars, 350 units for a whole share.
    assert [float(width) for width in re.findall(r'<rect x="62" y="\d+" width="([\d.]+)"', text)] == [
        87.5, 175.0, 262.5, 145.8, 284.4,
    ]  # fmt: skip
    for part in (
        "carl asked 6 labelled queries",
        "by hybrid",
        "75.0 % of the queries",
        "33.3 % of those right",
        "50.0 %",
    ):
        assert part in text
    high = re.findall(r'<span class="badge high">high</span></th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', text)
    assert high == [("2", "50.0 %", "0")]
    # Nobody has measured the other base.
    assert "Nobody has measured it on base/two" in page(client, base_model="base/two")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"base_model": "base/none"}, ["/base_model", "base/none"]),
        ({"strategy": "magic"}, ["strategy", "magic"]),
        ({"top_k": "51"}, ["/top_k", "51"]),
        ({"top_k": "ten"}, ["/top_k", "Leave it empty"]),
        ({"min_score": "1.5"}, ["/min_score", "from 0 to 1"]),
        ({"min_score": "nan"}, ["/min_score"]),
        ({"q": "a\n" * 33, "lines": "on"}, ["/texts", "33", "1 to 32"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_the_field_and_the_remedy(router, client, fields, parts) -> None:
    router.refresh()
    asked = {"q": TRIP, **fields}
    text = page(client, status=422, **asked)
    assert 'role="alert"' in text
    for part in parts:
        assert part in text
    # The part of a live page comes with 200, or it would not be shown.
    assert parts[0] in page(client, "/router/answer", **asked)


def test_a_router_that_is_away_is_told_with_when_to_ask_again(client, settings) -> None:
    settings.HUB_ROUTER_URL = "http://127.0.0.1:9"
    answer = client.get(address(q=TRIP))
    assert (answer.status_code, answer["Retry-After"]) == (503, "2")
    assert "The router does not answer" in answer.content.decode()


def test_what_anybody_wrote_is_text_and_never_code(experts, client) -> None:
    script = "<script>alert(1)</script>"
    Expert.objects.filter(name="travel").update(licence=script)
    for fields in ({}, {"lines": "on"}):
        text = page(client, q=f"{script}book a flight to Rome", min_score="0", owner='"><script>', **fields)
        assert script not in text
        assert '"><script>' not in text
    text = page(client, q="book a flight to Rome", min_score="0", base_model="base/one")
    assert "&lt;script&gt;alert(1)" in text


def test_a_hub_without_experts_says_how_to_begin(router, client) -> None:
    router.refresh()
    text = page(client)
    assert "No expert is here yet that you may see" in text
    assert "moerge eval-router queries.jsonl --publish" in text
    assert 'action="/api/v1/routing/export"' not in text
    assert "No expert to choose from." in page(client, q=TRIP)


def test_the_live_part_puts_the_question_into_the_address_where_it_fits(experts, client) -> None:
    live = client.post("/router/answer", {"q": TRIP, "base_model": "base/one", "lines": ""})
    assert live["HX-Replace-Url"] == address(q=TRIP, base_model="base/one")
    assert rows(live.content.decode())[1][1].startswith("ann/travel")
    assert "HX-Replace-Url" not in client.post("/router/answer", {"q": "trip " * 900})
    careful = Client(enforce_csrf_checks=True)
    assert careful.post("/router/answer", {"q": TRIP}).status_code == 403


def test_only_bases_with_experts_that_the_viewer_may_see_are_offered(experts, client) -> None:
    published("carl/hidden", "x", base="base/hidden", private=True)
    assert "base/hidden" not in page(client)
    assert 'value="base/hidden"' in page(signed_in(experts["carl/secret"]))
    assert 'value="base/two">base/two (1)' in page(client)
    person("dora")
