"""Quality of routing on a labelled set of queries, ranked by the functions that the router serves with."""

import argparse
import itertools
import json
import math
import operator
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moerge.embedding import DIMENSION
from moerge.routing import cards, catalogue
from moerge.routing.base import Query, Spec
from moerge.routing.cards import Card, Entry
from moerge.routing.state import Hit, State

NAME = "routing"
SUMMARY = "Right expert first: R@k, MRR and abstention on labelled queries, and the time each query takes"

BASE = "benchmark/base"
# What the same score reached when it was first measured on the development queries (standard error .012).
TARGETS = {"micro R@1": 0.475, "micro R@5": 0.685, "MRR": 0.570, "macro R@1": 0.637, "AUROC": 0.860}
# Which share of the queries with a right answer a default threshold lets through.
KEPT_SHARE = 0.86


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=Path, required=True, help="cards that queries point at, JSON lines")
    parser.add_argument("--distractors", type=Path, help="cards that no query points at, JSON lines")
    parser.add_argument("--queries", type=Path, required=True, help="queries with their gold expert, JSON lines")
    parser.add_argument("--predictions", type=Path, help="write one ranking per query here, JSON lines")
    parser.add_argument("--strategy", default="hybrid", choices=sorted(catalogue()), help="default: hybrid")
    parser.add_argument(
        "--splits",
        type=int,
        default=0,
        metavar="N",
        help="also halve the queries N times: thresholds from one half, quality and bands on the other; and how often "
        "each two strategies agree",
    )


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

    records = lines(arguments.experts, needed=("id", "name"))
    records += lines(arguments.distractors, needed=("id", "name")) if arguments.distractors else []
    near = {record["id"]: set(record.get("near", [])) for record in records}
    questions = [
        Question(id=record.get("id", row), text=record["q"], gold=record.get("gold"), suite=record.get("suite", "all"))
        for row, record in enumerate(lines(arguments.queries, needed=("q",)))
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
    if arguments.splits:
        rows += split_rows(
            questions,
            rankings,
            catalogue()[arguments.strategy].SPEC,
            expert_count=len(records),
            count=arguments.splits,
        )
        rows += agreement_rows(state, questions, vectors)
    return rows


def card_of(record: Mapping[str, Any]) -> Card:
    return Card(
        expert=record["id"],
        base_model=BASE,
        name=record["name"],
        description=record.get("description", ""),
        examples=tuple(record.get("examples", ())),
        tags=tuple(sorted({*record.get("categories", ()), *record.get("domains", ())})),
        instruction=record.get("instruction", ""),
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


def split_rows(
    questions: Sequence[Question],
    rankings: Sequence[Sequence[Hit]],
    spec: Spec,
    *,
    expert_count: int,
    count: int,
) -> list[dict[str, Any]]:
    """For each split the thresholds that one half gives, and on the other half quality and the bands of `spec`."""
    rows = []
    firsts = Firsts.of(questions, rankings)
    for number, chosen in enumerate(halves(questions, count=count), start=1):
        unused = np.flatnonzero(~chosen)
        met = quality([questions[place] for place in unused], [rankings[place] for place in unused], {})
        figures = {
            **{f"chosen {name}": value for name, value in thresholds(firsts.of_half(chosen)).items()},
            **{name: met[name] for name in ("micro R@1", "micro R@5", "MRR", "macro R@1", "AUROC") if name in met},
            **bands(firsts.of_half(~chosen), spec, expert_count=expert_count),
        }
        rows += [row(f"split {number}, {name}", value, "score or share") for name, value in figures.items()]
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Firsts:
    """Of each query (n,) the best score, whether it has a right expert, and whether that came first."""

    best: NDArray[np.float64]
    inside: NDArray[np.bool_]
    right: NDArray[np.bool_]

    @classmethod
    def of(cls, questions: Sequence[Question], rankings: Sequence[Sequence[Hit]]) -> Self:
        pairs = list(zip(questions, rankings, strict=True))
        return cls(
            best=np.array([hits[0].score if hits else 0.0 for hits in rankings]),
            inside=np.array([question.gold is not None for question in questions]),
            right=np.array(
                [question.gold is not None and rank_of({question.gold}, hits) == 1 for question, hits in pairs]
            ),
        )

    def of_half(self, half: NDArray[np.bool_]) -> "Firsts":
        return Firsts(best=self.best[half], inside=self.inside[half], right=self.right[half])


def halves(questions: Sequence[Question], *, count: int) -> list[NDArray[np.bool_]]:
    """Random halves (n,) of the queries, true for the half that is chosen on; every suite is halved alike."""
    draw = np.random.default_rng(0)
    suites = np.array([question.suite for question in questions])
    made = []
    for _ in range(count):
        half = np.zeros(len(questions), dtype=bool)
        for suite in sorted(set(suites)):
            places = draw.permutation(np.flatnonzero(suites == suite))
            half[places[: len(places) // 2]] = True
        made.append(half)
    return made


def thresholds(firsts: Firsts) -> dict[str, float]:
    """Thresholds in hundredths by these rules, of the best score of queries that have a right answer.

    min_score: the highest that keeps 86 % of them; high: the lowest from which on nine of ten have the right expert
    first; medium: the lowest from which on, up to high, three of five have it.
    """
    best, right = firsts.best[firsts.inside], firsts.right[firsts.inside]
    grid = [step / 100 for step in range(1, 100)]

    def lowest(share: float, *, below: float) -> float:
        for value in grid:
            among = (best >= value) & (best < below)
            if among.any() and right[among].mean() >= share:
                return value
        return grid[-1]

    high = lowest(0.9, below=math.inf)
    kept = [value for value in grid if (best >= value).mean() >= KEPT_SHARE]
    return {"min_score": max(kept, default=grid[0]), "medium": lowest(0.6, below=high), "high": high}


def bands(firsts: Firsts, spec: Spec, *, expert_count: int) -> dict[str, float]:
    """For each band of confidence R@1 of its queries, its share of the queries with an expert and of those without."""
    level = np.array(
        [
            "none" if score < spec.threshold(expert_count) else spec.confidence(score, expert_count)
            for score in firsts.best
        ]
    )
    out: dict[str, float] = {}
    for name in ("high", "medium", "low", "none"):
        here = level == name
        if (here & firsts.inside).any():
            out[f"{name}: R@1"] = float(firsts.right[here & firsts.inside].mean())
        out[f"{name}: of queries with an expert"] = float(here[firsts.inside].mean())
        if not firsts.inside.all():
            out[f"{name}: of queries without"] = float(here[~firsts.inside].mean())
    return out


def agreement_rows(state: State, questions: Sequence[Question], vectors: NDArray[np.float32]) -> list[dict[str, Any]]:
    """For each two strategies the share of queries for which both have the same expert first."""
    first = {
        name: [
            [hit.expert for hit in state.rank(Query(text=question.text, vector=vector), strategy=name, limit=1).hits]
            for question, vector in zip(questions, vectors, strict=True)
        ]
        for name in sorted(catalogue())
    }
    return [
        row(f"same first, {one} and {other}", statistics.fmean(map(operator.eq, first[one], first[other])), "share")
        for one, other in itertools.combinations(first, 2)
    ]


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


def lines(path: Path, *, needed: Sequence[str]) -> list[dict[str, Any]]:
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
