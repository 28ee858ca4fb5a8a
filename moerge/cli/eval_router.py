"""`moerge eval-router`: how well a hub routes queries whose right expert is known."""

import argparse
import json
from collections.abc import Iterator, Sequence
from math import isinf
from pathlib import Path
from typing import Any

from moerge.cli import arguments
from moerge.cli.route import add_choice
from moerge.cli.terminal import Terminal
from moerge.cli.verify import add_timeout
from moerge.client import Hub, asking, environment, evaluating, labelled
from moerge.client.asking import Wish
from moerge.client.errors import ClientError
from moerge.client.evaluating import Measured
from moerge.errors import ParameterInvalid

NAME = "eval-router"
HELP = "measure how well a hub routes labelled queries"
DESCRIPTION = """Asks a hub each query of QUERIES and compares its answer with the expert that ought to come first. A
line is {"q": "what is asked", "gold": "owner/name", "suite": "of what kind"}; gold may be a list, any of which is
right, or null where no expert fits. Equal scores count against the right expert. Only what your key may see is
ranked."""
EXAMPLE = """example:
  moerge eval-router queries.jsonl --base Qwen/Qwen3-0.6B --endpoint http://127.0.0.1:8000
  moerge eval-router queries.jsonl --strategy bm25 --json --out answers.jsonl
  moerge eval-router queries.jsonl --base Qwen/Qwen3-0.6B --publish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("queries", metavar="QUERIES", type=Path, help="JSON lines")
    add_choice(parser, top_k=asking.MOST_RESULTS)
    parser.add_argument(
        "--min-score", type=arguments.score, metavar="SCORE",
        help="threshold that abstention is counted at (default: the hub's own)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the ranking of each query here, JSON lines")
    parser.add_argument(
        "--publish", action="store_true", help="keep the figures on the hub, where its router page shows them"
    )
    add_timeout(parser)


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    if wanted.publish and environment.key(wanted.token) is None:
        raise ParameterInvalid(
            "Publishing needs an API key.", pointer="--publish", met="no key", wanted="a key with scope write",
            remedy="Pass --token or set HF_TOKEN; make one under Settings on the hub.",
        )  # fmt: skip
    queries = labelled.read(wanted.queries)
    wish = Wish(base_model=wanted.base, strategy=wanted.strategy, top_k=wanted.top_k, min_score=0.0)
    rows: list[Measured] = []
    with Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub:
        for answer in asking.ask(hub, [query.text for query in queries], wish, whole=True):
            rows.append(evaluating.measure(queries[len(rows)], answer))
            terminal.watch("asking", len(rows) / len(queries))
        last = rows[-1].answer
        threshold = last.default_min_score if wanted.min_score is None else wanted.min_score
        told: dict[str, Any] = {
            "base_model": wanted.base,
            "strategy": last.strategy,
            "index_seq": last.index_seq,
            "figures": evaluating.figures(rows, threshold=threshold),
        }
        if wanted.out is not None:
            wanted.out.write_text("".join(_predictions(rows)), encoding="utf-8")
        if wanted.publish:
            try:
                told |= {"published": _publish(hub, told)}
            except ClientError:
                # The measurement took long; a hub that does not want it must not lose it.
                for line in _lines(told):
                    terminal.say(line)
                raise
    _warn(rows, terminal)
    terminal.answer(told, _lines(told))


def _publish(hub: Hub, told: dict[str, Any]) -> Any:
    """The evaluation's number on the hub. Raises ClientError."""
    _, body = hub.post("/api/v1/routing/evaluations", told)
    return body.get("id") if isinstance(body, dict) else None


def _warn(rows: Sequence[Measured], terminal: Terminal) -> None:
    if absent := evaluating.never_found(rows):
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        terminal.warn(f"No answer named {', '.join(absent[:5])}{more}: misspelt, hidden from you, or on another base.")


def _predictions(rows: Sequence[Measured]) -> Iterator[str]:
    for row in rows:
        hits = row.answer.hits
        line = {
            "id": row.query.id,
            "gold": sorted(row.query.gold),
            "rank": None if isinf(row.rank) else int(row.rank),
            "ranked": [hit.expert for hit in hits],
            "scores": [hit.score for hit in hits],
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _lines(told: dict[str, Any]) -> list[str]:
    figures = told["figures"]
    rows = [
        ("queries", f"{figures['in_scope']} with an expert, {figures['out_of_scope']} without"),
        ("asked", f"base {told['base_model'] or 'any'}, strategy {told['strategy']}, index {told['index_seq']}"),
        *((f"R@{depth}", _shown(figures[f"recall_{depth}"])) for depth in evaluating.DEPTHS),
        ("MRR", _shown(figures["mrr"])),
        *((f"macro R@{depth}", _shown(figures[f"macro_recall_{depth}"])) for depth in evaluating.DEPTHS),
        ("AUROC", _shown(figures["auroc"])),
        ("threshold", f"{figures['threshold']:.3f}"),
        ("kept", f"{_shown(figures['kept'])} of those with an expert, R@1 {_shown(figures['recall_1_of_kept'])}"),
        ("let through", f"{_shown(figures['let_through'])} of those without"),
    ]
    if len(figures["suites"]) > 1:
        rows += [(f"suite {own['suite']}", _suite(own)) for own in figures["suites"]]
    rows += [(f"says {band['confidence']}", _band(band)) for band in figures["calibration"]]
    rows += [
        ("confusion", f"{pair['queries']} x {pair['gold']} taken for {pair['found']}")
        for pair in figures["confusions"][:10]
    ]
    if told.get("published"):
        rows.append(("published", f"evaluation {told['published']}"))
    return arguments.table(rows)


def _suite(own: dict[str, Any]) -> str:
    recalls = f"R@1 {_shown(own['recall_1'])}, R@5 {_shown(own['recall_5'])}"
    return f"{own['queries']} queries, {recalls}, MRR {_shown(own['mrr'])}"


def _band(band: dict[str, Any]) -> str:
    right = _shown(band["right"] / band["in_scope"] if band["in_scope"] else None)
    return f"{band['in_scope']} queries with an expert, right {right}; {band['out_of_scope']} without"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
