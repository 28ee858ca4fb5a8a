"""Quality of routing on a labelled set of queries, ranked by the functions that the router serves with."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerge.embedding import DIMENSION
from moerge.routing import cards, catalogue
from moerge.routing.base import Query
from moerge.routing.cards import Card, Entry
from moerge.routing.state import Hit, State

NAME = "routing"
SUMMARY = "Right expert first: R@k, MRR and abstention on labelled queries, and the time each query takes"

BASE = "benchmark/base"
# What the same score reached when it was first measured on the development queries (standard error .012).
TARGETS = {"micro R@1": 0.475, "micro R@5": 0.685, "MRR": 0.570, "macro R@1": 0.637, "AUROC": 0.860}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=Path, required=True, help="cards that queries point at, JSON lines")
    parser.add_argument("--distractors", type=Path, help="cards that no query points at, JSON lines")
    parser.add_argument("--queries", type=Path, required=True, help="queries with their gold expert, JSON lines")
    parser.add_argument("--predictions", type=Path, help="write one ranking per query here, JSON lines")
    parser.add_argument("--strategy", default="hybrid", choices=sorted(catalogue()), help="default: hybrid")


@dataclass(frozen=True)
class Question:
    id: str | int
    text: str
    gold: str | None
    suite: str


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report."""
    # The import takes 10 s, which `bin/bench --list` should not cost.
    from moerge.embedding import encoder as encoder_module  # noqa: PLC0415

    records = _lines(arguments.experts, needed=("id", "name"))
    records += _lines(arguments.distractors, needed=("id", "name")) if arguments.distractors else []
    near = {record["id"]: set(record.get("near", [])) for record in records}
    questions = [
        Question(id=record.get("id", row), text=record["q"], gold=record.get("gold"), suite=record.get("suite", "all"))
        for row, record in enumerate(_lines(arguments.queries, needed=("q",)))
    ]
    if not any(question.gold for question in questions):
        raise ValueError(f"{arguments.queries}: no query has a gold expert")
    encoder = encoder_module.load(cache_count=0)
    _say(f"encoding {len(records)} cards")
    state = State(encoder_id=encoder.id, dimension=DIMENSION).changed(
        seq=1, put=entries([card_of(record) for record in records], encoder.encode)
    )
    _say(f"encoding {len(questions)} queries")
    started = time.process_time()
    vectors = encoder.encode([question.text for question in questions])
    encode_ms = 1000 * (time.process_time() - started) / len(questions)
    rankings, search_ms = rank_all(state, questions, vectors, strategy=arguments.strategy)
    if arguments.predictions:
        write_predictions(arguments.predictions, questions, rankings)
    rows = [
        row(name, value, "share", target=TARGETS.get(name))
        for name, value in quality(questions, rankings, near).items()
    ]
    rows.append(row("encode, batch of 32, per query", encode_ms, "ms of CPU"))
    rows.append(row("search and score, p50", statistics.median(search_ms), "ms of CPU"))
    rows.append(row("search and score, p99", float(np.percentile(search_ms, 99)), "ms of CPU"))
    return rows


def card_of(record: Mapping[str, Any]) -> Card:
    return Card(
        expert=record["id"],
        base_model=BASE,
        name=record["name"],
        description=record.get("description", ""),
        examples=tuple(record.get("examples", ())),
    )


def entries(all_cards: Sequence[Card], encode: Any) -> list[Entry]:
    """Encode all texts in one go, longest together, and cut the vectors back into cards."""
    texts = [cards.texts(card) for card in all_cards]
    vectors = encode([text for own in texts for text in own])
    made, start = [], 0
    for card, own in zip(all_cards, texts, strict=True):
        made.append(cards.entry(card, vectors[start : start + len(own)]))
        start += len(own)
    return made


def rank_all(
    state: State, questions: Sequence[Question], vectors: NDArray[np.float32], *, strategy: str
) -> tuple[list[tuple[Hit, ...]], list[float]]:
    """All candidates of each question in order, and the milliseconds of CPU that its ten best take."""
    rankings, times_ms = [], []
    for question, vector in zip(questions, vectors, strict=True):
        query = Query(text=question.text, vector=vector)
        started = time.process_time()
        state.rank(query, base_model=BASE, strategy=strategy, limit=10)
        times_ms.append(1000 * (time.process_time() - started))
        rankings.append(state.rank(query, base_model=BASE, strategy=strategy).hits)
    return rankings, times_ms


def quality(
    questions: Sequence[Question], rankings: Sequence[Sequence[Hit]], near: Mapping[str, set[str]]
) -> dict[str, float]:
    """Strict and relaxed recall, MRR, macro means over suites, and AUROC of the top score against out-of-scope."""
    ranks: dict[str, list[float]] = {}
    relaxed: list[float] = []
    inside, outside = [], []
    for question, hits in zip(questions, rankings, strict=True):
        top = hits[0].score if hits else 0.0
        if question.gold is None:
            outside.append(top)
            continue
        inside.append(top)
        ranks.setdefault(question.suite, []).append(rank_of({question.gold}, hits))
        relaxed.append(rank_of({question.gold} | near.get(question.gold, set()), hits))
    micro = [rank for own in ranks.values() for rank in own]
    out: dict[str, float] = {f"micro R@{k}": recall(micro, k) for k in (1, 5, 10)}
    out["MRR"] = sum(1 / rank for rank in micro) / len(micro)
    out |= {f"macro R@{k}": statistics.fmean(recall(own, k) for own in ranks.values()) for k in (1, 5)}
    out |= {f"relaxed R@{k}": recall(relaxed, k) for k in (1, 5)}
    out |= {f"R@1 {suite}": recall(own, 1) for suite, own in sorted(ranks.items())}
    if outside:
        out["AUROC"] = auroc(inside, outside)
    return out


def rank_of(gold: set[str], hits: Sequence[Hit]) -> float:
    """Best rank of a gold expert; equal scores count against it, and one that is not there has no rank."""
    scores = [hit.score for hit in hits if hit.expert in gold]
    if not scores:
        return float("inf")
    return 1 + sum(hit.score >= max(scores) and hit.expert not in gold for hit in hits)


def recall(ranks: Sequence[float], k: int) -> float:
    return sum(rank <= k for rank in ranks) / len(ranks)


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Share of pairs in which the in-scope query has the higher score; equal scores count half."""
    ordered = np.sort(np.asarray(outside))
    scores = np.asarray(inside)
    below = np.searchsorted(ordered, scores, side="left")
    equal = np.searchsorted(ordered, scores, side="right") - below
    return float((below + 0.5 * equal).sum() / (len(inside) * len(outside)))


def write_predictions(path: Path, questions: Sequence[Question], rankings: Sequence[Sequence[Hit]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question, hits in zip(questions, rankings, strict=True):
            line = {"id": question.id, "ranked": [hit.expert for hit in hits], "scores": [hit.score for hit in hits]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def row(name: str, value: float, unit: str, *, target: float | None = None) -> dict[str, Any]:
    # The margin of .005 is what another machine's arithmetic may move.
    met = None if target is None else value >= target - 0.005
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": None,
        "peer_value": None,
        "ratio": None,
        "target": target,
        "met": met,
    }


def _lines(path: Path, *, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ValueError where one is none, or lacks a field."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            missing = [name for name in needed if not isinstance(record, dict) or name not in record]
            if missing:
                raise ValueError(f"{path}, line {number}: no field {missing[0]!r}")
            records.append(record)
    return records


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
