"""How well a hub routes labelled queries: recall, calibration, abstention and what is taken for what."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any

from moerge.client.asking import Answer, Hit
from moerge.client.labelled import Labelled

BANDS = ("high", "medium", "low")
DEPTHS = (1, 5, 10)
MOST_CONFUSIONS = 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A query with its answer, asked without threshold; `rank` is that of its best right expert."""

    query: Labelled
    answer: Answer
    rank: float

    @property
    def top(self) -> float:
        """The best score; 0 where nothing was found at all."""
        return self.answer.hits[0].score if self.answer.hits else 0.0


def measure(query: Labelled, answer: Answer) -> Measured:
    return Measured(query=query, answer=answer, rank=rank_of(query.gold, answer.hits))


def rank_of(gold: frozenset[str], hits: Sequence[Hit]) -> float:
    """Place of the best right expert; equal scores of wrong ones count before it. Infinite when it was not found."""
    best = max((hit.score for hit in hits if hit.expert.casefold() in gold), default=None)
    if best is None:
        return inf
    return 1 + sum(hit.score >= best and hit.expert.casefold() not in gold for hit in hits)


def figures(rows: Sequence[Measured], *, threshold: float) -> dict[str, Any]:
    """What the measured queries amount to; figures that need queries of a kind that is not there are None.

    `threshold` is the score below which the hub abstains. Macro figures are means over suites. AUROC is the share of
    pairs in which a query that has an expert scores above one that has none, equal scores counting half.
    """
    inside = [row for row in rows if row.query.gold]
    outside = [row for row in rows if not row.query.gold]
    kept = [row for row in inside if row.top >= threshold]
    suites = {
        name: _recalls([row for row in inside if row.query.suite == name])
        for name in sorted({row.query.suite for row in inside})
    }
    return {
        "in_scope": len(inside),
        "out_of_scope": len(outside),
        **_recalls(inside),
        **{f"macro_recall_{depth}": _mean(own[f"recall_{depth}"] for own in suites.values()) for depth in DEPTHS},
        "auroc": auroc([row.top for row in inside], [row.top for row in outside]),
        "threshold": threshold,
        "kept": _share(inside, lambda row: row.top >= threshold),
        "recall_1_of_kept": _share(kept, lambda row: row.rank <= 1),
        "let_through": _share(outside, lambda row: row.top >= threshold),
        "suites": [
            {"suite": name, "queries": sum(row.query.suite == name for row in inside), **own}
            for name, own in suites.items()
        ],
        "calibration": [_band(band, inside, outside) for band in BANDS],
        "confusions": confusions(inside),
    }


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float | None:
    """Share of pairs in which the first has the higher score, equal scores counting half; None without pairs."""
    if not inside or not outside:
        return None
    ordered = sorted(outside)
    wins = sum(bisect_left(ordered, score) + bisect_right(ordered, score) for score in inside)
    return wins / (2 * len(inside) * len(outside))


def confusions(inside: Iterable[Measured]) -> list[dict[str, Any]]:
    """Which expert came first where another was right, the most frequent pairs first."""
    pairs: Counter[tuple[str, str]] = Counter()
    for row in inside:
        if row.rank > 1 and row.answer.hits:
            # The first that is wrong: of equal scores a right one may stand before it.
            found = next(hit.expert for hit in row.answer.hits if hit.expert.casefold() not in row.query.gold)
            pairs[min(row.query.gold), found] += 1
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [{"gold": gold, "found": found, "queries": count} for (gold, found), count in ordered[:MOST_CONFUSIONS]]


def never_found(rows: Iterable[Measured]) -> list[str]:
    """Right experts that no answer named: misspelt, hidden from this key, on another base, or without a good card."""
    wanted: set[str] = set()
    met: set[str] = set()
    for row in rows:
        wanted |= row.query.gold
        met |= {hit.expert.casefold() for hit in row.answer.hits}
    return sorted(wanted - met)


def _recalls(inside: Sequence[Measured]) -> dict[str, float | None]:
    ranks = [row.rank for row in inside]
    recalls = {f"recall_{depth}": _mean(float(rank <= depth) for rank in ranks) for depth in DEPTHS}
    return {**recalls, "mrr": _mean(1 / rank for rank in ranks)}


def _band(band: str, inside: Iterable[Measured], outside: Iterable[Measured]) -> dict[str, Any]:
    own = [row for row in inside if row.answer.hits and row.answer.hits[0].confidence == band]
    strange = [row for row in outside if row.answer.hits and row.answer.hits[0].confidence == band]
    right = sum(row.rank <= 1 for row in own)
    return {"confidence": band, "in_scope": len(own), "right": right, "out_of_scope": len(strange)}


def _share(rows: Sequence[Measured], holds: Callable[[Measured], bool]) -> float | None:
    return sum(map(holds, rows)) / len(rows) if rows else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
