"""`moerge route`: which experts of a hub fit a text, or each of several."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.cli.verify import add_timeout
from moerge.client import Hub, asking
from moerge.client.asking import Answer, Wish
from moerge.errors import ParameterInvalid

NAME = "route"
HELP = "ask a hub which experts fit a text"
DESCRIPTION = """Asks a hub which experts fit TEXT, for the base model you run. Without TEXT every line of the standard
input is a text of its own, asked 32 at a time."""
EXAMPLE = """example:
  moerge route "how long is my passport valid" --base Qwen/Qwen3-0.6B --endpoint http://127.0.0.1:8000
  moerge route --top-k 1 --json < questions.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what is to be done; say the task, not only the input")
    add_choice(parser, top_k=5)
    parser.add_argument("--min-score", type=arguments.score, metavar="SCORE", help="below it the hub abstains, 0 to 1")
    parser.add_argument("--owner", metavar="NAME", help="only experts of this owner")
    parser.add_argument("--tag", metavar="TAG", action="append", help="only experts with this tag; may be repeated")
    parser.add_argument("--licence", metavar="NAME", help="only experts under this licence")
    parser.add_argument("--explain", action="store_true", help="show the parts of each score and the nearest example")
    add_timeout(parser)


def add_choice(parser: argparse.ArgumentParser, *, top_k: int) -> None:
    """For which base, how, and how many."""
    parser.add_argument("--base", metavar="NAME", help="base model that you run (default: experts of any)")
    parser.add_argument("--strategy", metavar="NAME", help="how experts are scored (default: the hub's)")
    parser.add_argument(
        "--top-k", type=arguments.results, default=top_k, metavar="N",
        help=f"how many experts, 1 to {asking.MOST_RESULTS} (default: %(default)s)",
    )  # fmt: skip


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    texts = _texts(wanted.text)
    filters = {"owner": wanted.owner, "tags": wanted.tag, "licence": wanted.licence}
    wish = Wish(
        base_model=wanted.base,
        strategy=wanted.strategy,
        top_k=wanted.top_k,
        min_score=wanted.min_score,
        filters={name: value for name, value in filters.items() if value},
        explain=wanted.explain,
    )
    answers: list[Answer] = []
    with Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub:
        for answer in asking.ask(hub, texts, wish):
            answers.append(answer)
            terminal.watch("asking", len(answers) / len(texts))
    if any(answer.degraded for answer in answers):
        terminal.warn("The hub is still loading its encoder: these were found by words alone.")
    records = [_record(text, answer) for text, answer in zip(texts, answers, strict=True)]
    record = records[0] if wanted.text is not None else {"answers": records}
    terminal.answer(record, list(_lines(texts, answers, explain=wanted.explain)))


def _texts(text: str | None) -> list[str]:
    """TEXT, or the lines of the standard input. Raises ParameterInvalid for nothing."""
    lines = [text] if text is not None else [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    found = [line for line in lines if line.strip()]
    if not found:
        raise ParameterInvalid(
            "Nothing is asked.", pointer="TEXT", met="no text", wanted="TEXT, or lines on the standard input",
            remedy="Give the text in quotes.",
        )  # fmt: skip
    return found


def _record(text: str, answer: Answer) -> dict[str, Any]:
    return {
        "text": text,
        "results": [dict(hit.record) for hit in answer.hits],
        "abstained": answer.abstained,
        "best_score": answer.best_score,
        "min_score": answer.min_score,
        "strategy": answer.strategy,
        "degraded": answer.degraded,
        "index_seq": answer.index_seq,
    }


def _lines(texts: list[str], answers: list[Answer], *, explain: bool) -> Iterator[str]:
    for text, answer in zip(texts, answers, strict=True):
        if len(texts) > 1:
            yield f"> {text[:100]}"
        yield from _abstained(answer) if answer.abstained else _hits(answer, explain=explain)


def _hits(answer: Answer, *, explain: bool) -> Iterator[str]:
    width = max((len(hit.expert) for hit in answer.hits), default=0)
    for place, hit in enumerate(answer.hits, start=1):
        yield f"{place:2}  {hit.expert:{width}}  {hit.score:.3f}  {hit.confidence}"
        if not explain:
            continue
        parts = hit.record.get("parts")
        if isinstance(parts, dict):
            yield "    " + "  ".join(f"{name} {value}" for name, value in parts.items())
        if example := hit.record.get("matched_example"):
            yield f"    like: {str(example)[:120]}"


def _abstained(answer: Answer) -> list[str]:
    """Why there is no expert, and what can be done."""
    if answer.best_score is None:
        return ["no expert: none is there for this base model and these filters"]
    scores = f"the best score is {answer.best_score:.3f}, below the threshold {answer.min_score:.3f}"
    return [f"no expert: {scores}; say more of the task, or lower it with --min-score"]
