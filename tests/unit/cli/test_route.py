"""`moerge route` against a scripted hub: what is sent, what is shown, and why there is no answer."""

import io
import json
from collections.abc import Iterator

import pytest

from tests.unit.cli.answers import ROUTE, answer, routing
from tests.unit.client import servers
from tests.unit.client.servers import Server, as_json


@pytest.fixture
def server() -> Iterator[Server]:
    with servers.running() as found:
        found.routes[ROUTE] = routing
        yield found


def test_the_text_goes_with_all_that_was_wished_and_the_experts_come_in_order(moerge, server):
    done = moerge(
        "route", "right", "--base", "b/one", "--strategy", "bm25", "--top-k", 2, "--min-score", "0.25", "--owner", "ann",
        "--tag", "x", "--tag", "y", "--licence", "mit", "--explain", "--endpoint", server.url,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert [line.split() for line in done.out.splitlines() if "ann/" in line] == [
        ["1", "ann/a", "0.900", "high"],
        ["2", "ann/b", "0.500", "medium"],
    ]
    assert json.loads(server.asked[0].body) == {
        "texts": ["right"], "base_model": "b/one", "strategy": "bm25", "top_k": 2, "min_score": 0.25, "explain": True,
        "filters": {"owner": "ann", "tags": ["x", "y"], "licence": "mit"},
    }  # fmt: skip


def test_lines_of_the_standard_input_are_texts_of_their_own(moerge, server, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("right\n\n  \ntied\n"))
    told = moerge("route", "--json", "--endpoint", server.url).json
    assert [(row["text"], row["results"][0]["expert"]) for row in told["answers"]] == [
        ("right", "ann/a"), ("tied", "ann/b"),
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    nothing = moerge("route", "--endpoint", server.url)
    assert (nothing.status, "Nothing is asked" in nothing.err) == (2, True)


def test_abstaining_is_told_with_both_numbers_and_what_to_do(moerge, server):
    empty = answer("right") | {"results": [], "abstained": True, "best_score": 0.21, "min_score": 0.3}
    server.routes[ROUTE] = [as_json({"answers": [empty], "index_seq": 1})]
    done = moerge("route", "hm", "--endpoint", server.url)
    assert done.status == 0
    assert "best score is 0.210, below the threshold 0.300; say more of the task" in done.out
    server.routes[ROUTE] = [as_json({"answers": [empty | {"best_score": None}], "index_seq": 1})]
    assert "none is there for this base model" in moerge("route", "hm", "--endpoint", server.url).out


@pytest.mark.parametrize(
    "options", [["--top-k", "0"], ["--top-k", "51"], ["--top-k", "²"], ["--min-score", "1.5"], ["--min-score", "nan"]]
)
def test_options_out_of_range_are_wrong_usage(moerge, server, options):
    assert moerge("route", "x", *options, "--endpoint", server.url).status == 2
    assert server.asked == []


def test_what_a_hub_writes_cannot_command_the_terminal(moerge, server):
    hostile = answer("right")
    hostile["results"][0]["matched_example"] = "\x1b[2J owned"
    server.routes[ROUTE] = [as_json({"answers": [hostile], "index_seq": 1})]
    assert "\x1b" not in moerge("route", "x", "--explain", "--endpoint", server.url).out
