"""`moerge eval-router` against a scripted hub: figures worked by hand, batches, waiting, and lines that are wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moerge.client import Hub, asking
from moerge.client.asking import Wish
from moerge.client.errors import WaitedTooLong
from tests.unit.cli.answers import ROUTE, answer, routing
from tests.unit.client import servers
from tests.unit.client.servers import Reply, Server, as_json, problem

EVALUATIONS = "/api/v1/routing/evaluations"
QUERIES = [
    {"q": "right", "gold": "ann/a", "suite": "first"},
    {"q": "tied", "gold": "ann/b", "suite": "first"},
    {"text": "sixth", "gold": ["ann/c", "Ann/d"], "suite": "second", "id": "d3"},
    {"q": "absent", "gold": "ann/z", "suite": "first"},
    {"q": "strange", "gold": None},
    {"q": "stranger", "gold": None},
]


@pytest.fixture
def server() -> Iterator[Server]:
    with servers.running() as found:
        found.routes[ROUTE] = routing
        yield found


@pytest.fixture
def queries(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: object) -> Path:
        path = tmp_path / "queries.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_the_figures_are_those_of_a_calculation_by_hand(moerge, server, queries, tmp_path):
    path = queries(*QUERIES)
    done = moerge("eval-router", path, "--base", "b/one", "--endpoint", server.url, "--json", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    told = done.json
    assert {name: told[name] for name in ("base_model", "strategy", "index_seq")} == {
        "base_model": "b/one", "strategy": "hybrid", "index_seq": 12,
    }  # fmt: skip
    # Ranks 1, 2 (the equal score counts against it), 6 and none; suites of three and one.
    figures = told["figures"]
    lists = {name: figures.pop(name) for name in ("suites", "calibration", "confusions")}
    assert figures == pytest.approx(
        {
            "in_scope": 4, "out_of_scope": 2,
            "recall_1": 1 / 4, "recall_5": 2 / 4, "recall_10": 3 / 4, "mrr": (1 + 1 / 2 + 1 / 6) / 4,
            "macro_recall_1": (1 / 3 + 0) / 2, "macro_recall_5": (2 / 3 + 0) / 2, "macro_recall_10": (2 / 3 + 1) / 2,
            # .9, .7 and .5 beat .35 and .2; .2 is equal to one of them.
            "auroc": (2 + 2 + 2 + 0.5) / 8,
            "threshold": 0.3, "kept": 3 / 4, "recall_1_of_kept": 1 / 3, "let_through": 1 / 2,
        }
    )  # fmt: skip
    assert [row["suite"] for row in lists["suites"]] == ["first", "second"]
    assert lists["suites"][0] == pytest.approx(
        {"suite": "first", "queries": 3, "recall_1": 1 / 3, "recall_5": 2 / 3, "recall_10": 2 / 3, "mrr": 1.5 / 3}
    )
    assert lists["calibration"] == [
        {"confidence": "high", "in_scope": 2, "right": 1, "out_of_scope": 0},
        {"confidence": "medium", "in_scope": 1, "right": 0, "out_of_scope": 0},
        {"confidence": "low", "in_scope": 1, "right": 0, "out_of_scope": 2},
    ]
    assert lists["confusions"] == [
        {"gold": "ann/b", "found": "ann/a", "queries": 1},
        {"gold": "ann/c", "found": "ann/a", "queries": 1},
        {"gold": "ann/z", "found": "ann/a", "queries": 1},
    ]
    assert "No answer named ann/c, ann/z" in done.err
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 6, None, None, None]
    assert (rows[2]["id"], rows[2]["ranked"][-1], rows[2]["scores"][-1]) == ("d3", "ann/D", 0.3)
    asked = json.loads(server.asked[0].body)
    assert {name: asked[name] for name in ("base_model", "top_k", "min_score")} == {
        "base_model": "b/one", "top_k": 50, "min_score": 0.0,
    }  # fmt: skip


def test_a_threshold_of_ones_own_is_what_abstention_is_counted_at(moerge, server, queries):
    done = moerge("eval-router", queries(*QUERIES), "--min-score", "0.7", "--endpoint", server.url, "--json")
    figures = done.json["figures"]
    assert [figures[name] for name in ("threshold", "kept", "let_through")] == [0.7, 0.5, 0.0]


def test_figures_without_queries_of_their_kind_are_absent_and_not_zero(moerge, server, queries):
    done = moerge("eval-router", queries(QUERIES[4]), "--endpoint", server.url, "--json")
    figures = done.json["figures"]
    assert {figures[name] for name in ("recall_1", "mrr", "macro_recall_1", "auroc", "kept", "recall_1_of_kept")} == {
        None
    }
    assert figures["let_through"] == 1.0
    assert figures["suites"] == []
    words = moerge("eval-router", queries(QUERIES[0]), "--endpoint", server.url).out
    assert "AUROC" in words
    assert "let through  – of those without" in words


def test_queries_are_asked_thirty_two_at_a_time_and_a_busy_hub_is_waited_for(moerge, server, queries):
    refusals = [problem(429, "rate-exceeded", "Slower.", retry_after=0)]
    server.routes[ROUTE] = lambda asked: refusals.pop() if refusals else routing(asked)
    done = moerge("eval-router", queries(*QUERIES[:1] * 70), "--endpoint", server.url, "--json")
    assert done.status == 0, done.err
    assert [len(json.loads(asked.body)["texts"]) for asked in server.asked] == [32, 32, 32, 6]
    assert done.json["figures"]["in_scope"] == 70


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, seconds: float) -> Any:
        from moerge.client.patience import Patience

        return Patience(seconds, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_answers_by_words_alone_are_not_measured(server):
    states = [True, True, False]
    server.routes[ROUTE] = lambda _: as_json(
        {"answers": [answer("right", degraded=states.pop(0))], "index_seq": 1, "embedding_model": None}
    )
    clock = Clock()
    with Hub(server.url, patience=clock) as hub:
        (found,) = asking.ask(hub, ["right"], Wish(), whole=True)
    assert (found.degraded, clock.now, len(server.asked)) == (False, 4.0, 3)
    states[:] = [True] * 9
    with Hub(server.url, wait_seconds=5, patience=clock) as hub, pytest.raises(WaitedTooLong, match="encoder"):
        list(asking.ask(hub, ["right"], Wish(), whole=True))
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "line 2: met 'list', wanted a JSON object"),
        ("{oops", "line 2: met"),
        ('{"q": "x", "q": "y", "gold": null}', "line 2"),
        ({"gold": "ann/a"}, "line 2, q: met None, wanted a text"),
        ({"q": " \t", "gold": "ann/a"}, "line 2, q"),
        ({"q": "x" * 20_001, "gold": None}, "line 2, q: met '20001 characters'"),
        ({"q": "x", "text": "y", "gold": None}, "line 2, text: met 'both q and text'"),
        ({"q": "x"}, "line 2, gold: met 'nothing'"),
        ({"q": "x", "gold": "travel"}, "line 2, gold: met 'travel', wanted owner/name"),
        ({"q": "x", "gold": []}, "line 2, gold"),
        ({"q": "x", "gold": ["ann/a", 3]}, "line 2, gold: met 3, wanted owner/name"),
        ({"q": "x", "gold": None, "suite": ""}, "line 2, suite"),
        ({"q": "x", "gold": None, "golden": 1}, "line 2, golden: met 'an unknown field'"),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named_with_its_field_and_nothing_is_asked(moerge, server, queries, line, words):
    done = moerge("eval-router", queries(QUERIES[0], line), "--endpoint", server.url)
    assert done.status == 1
    assert words in done.err, done.err
    assert server.asked == []


def test_an_empty_file_and_one_that_is_not_there_are_refused(moerge, server, queries, tmp_path):
    assert "holds no query" in moerge("eval-router", queries("", "  "), "--endpoint", server.url).err
    assert moerge("eval-router", tmp_path / "none", "--endpoint", server.url).status == 1


def test_blank_lines_and_a_byte_order_mark_are_no_queries(moerge, server, tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "right", "gold": "ann/a"}\r\n\r\n{"q": "tied", "gold": "ann/b"}\r\n')
    done = moerge("eval-router", path, "--endpoint", server.url, "--json")
    assert done.json["figures"]["recall_1"] == 0.5


def test_publishing_sends_the_figures_with_the_key(moerge, server, queries):
    server.routes[EVALUATIONS] = [Reply(b'{"id": 7}', 201, {"Content-Type": "application/json"})]
    path = queries(*QUERIES)
    done = moerge("eval-router", path, "--publish", "--token", "moe_x", "--endpoint", server.url, "--json")
    assert done.status == 0, done.err
    (sent,) = server.of(EVALUATIONS)
    assert sent.headers["authorization"] == "Bearer moe_x"
    told = done.json
    assert told.pop("published") == 7
    assert json.loads(sent.body) == told
    # What was asked stays with whoever asked it.
    assert "stranger" not in sent.body.decode()


def test_a_hub_that_refuses_to_publish_does_not_lose_the_figures(moerge, server, queries):
    server.routes[EVALUATIONS] = [problem(403, "scope-missing", "The key may not do this.")]
    done = moerge("eval-router", queries(*QUERIES), "--publish", "--token", "moe_x", "--endpoint", server.url)
    assert done.status == 1
    assert "scope-missing" in done.err
    assert "0.417" in done.err  # the MRR
    nobody = moerge("eval-router", queries(*QUERIES), "--publish", "--endpoint", server.url)
    assert (nobody.status, "needs an API key" in nobody.err) == (2, True)


@pytest.mark.parametrize(
    "body",
    [
        {"answers": [], "index_seq": 1},
        {"answers": [{}], "index_seq": 1},
        {"answers": [answer("right") | {"results": [{"expert": 3}]}], "index_seq": 1},
        {"answers": [answer("right") | {"default_min_score": True}], "index_seq": 1},
        {"answers": [answer("right")], "index_seq": "1"},
    ],
)
def test_what_is_no_answer_of_a_hub_is_called_so(moerge, server, queries, body):
    server.routes[ROUTE] = [as_json(body)]
    done = moerge("eval-router", queries(QUERIES[0]), "--endpoint", server.url)
    assert (done.status, "answer-invalid" in done.err) == (1, True)
