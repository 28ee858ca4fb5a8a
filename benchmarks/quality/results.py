"""Results of one kind of expert on one task, as rows of the report and as a table in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality import statistics
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.statistics import Paired, Spread

# A demo expert may lose this many points at the density that is used by default.
TARGET_POINTS = 1.0
TARGET_VARIANT = "default, k = 20%"


@dataclass(frozen=True)
class Measured:
    """A variant by its label, with the outcome under every seed.

    Of a compressed one also, as means over seeds: how many times smaller than bfloat16 its ternary tensors are, and
    the cosine of what is left, of B·A for LoRA and of the task vector for others.
    """

    label: str
    outcomes: tuple[Outcome, ...]
    ratio: float | None = None
    cosine: float | None = None

    @property
    def accuracy(self) -> Spread:
        """In percent, over seeds."""
        return statistics.spread([100 * outcome.accuracy for outcome in self.outcomes])

    @property
    def nll(self) -> Spread:
        """Over seeds."""
        return statistics.spread([outcome.mean_nll for outcome in self.outcomes])


@dataclass(frozen=True)
class Results:
    """All variants of one kind of expert on one task; the first one is what the others are compared with."""

    kind: str
    task: str
    measured: tuple[Measured, ...]

    @property
    def original(self) -> Measured:
        """What the others are compared with."""
        return self.measured[0]

    def points(self, one: Measured) -> Paired:
        """Difference of accuracy to the original, in points, row by row."""
        pairs = [[100.0 * outcome.correct for outcome in side.outcomes] for side in (one, self.original)]
        return statistics.paired(*pairs)

    def nll_difference(self, one: Measured) -> Paired:
        """Difference of the negative log-likelihood to the original, row by row."""
        return statistics.paired(*([outcome.nll for outcome in side.outcomes] for side in (one, self.original)))


def pooled(results: Sequence[Results], task: str) -> Results:
    """The rows of several tasks as one, each variant with the rows of all of them."""
    together = []
    for same in zip(*(result.measured for result in results), strict=True):
        outcomes = tuple(
            Outcome(np.concatenate([part.correct for part in parts]), np.concatenate([part.nll for part in parts]))
            for parts in zip(*(one.outcomes for one in same), strict=True)
        )
        together.append(Measured(same[0].label, outcomes))
    return Results(results[0].kind, task, tuple(together))


def rows(results: Sequence[Results]) -> list[dict[str, Any]]:
    """The rows of the report: accuracy in %, differences in points, each with its standard errors."""
    return [row for result in results for one in result.measured for row in _rows(result, one)]


def _rows(result: Results, one: Measured) -> list[dict[str, Any]]:
    name = f"{result.kind} {result.task}, {one.label}"
    is_first = one is result.original
    accuracy, nll = (None, None) if is_first else (result.original.accuracy.mean, result.original.nll.mean)
    found = [
        row(f"{name}: accuracy", one.accuracy.mean, "%", accuracy),
        row(f"{name}: accuracy, standard error over seeds", one.accuracy.error, "points"),
        row(f"{name}: NLL", one.nll.mean, "nats", nll),
        row(f"{name}: NLL, standard error over seeds", one.nll.error, "nats"),
    ]
    if not is_first:
        for what, unit, paired in (
            ("accuracy", "points", result.points(one)),
            ("NLL", "nats", result.nll_difference(one)),
        ):
            label = f"{name}: paired difference of {what}"
            found.append(row(label, paired.mean, unit, target=_target(result, one, what)))
            found.append(row(f"{label}, standard error over rows", paired.rows, unit))
            found.append(row(f"{label}, standard error over seeds", paired.seeds, unit))
    if one.ratio is not None:
        found.append(row(f"{name}: smaller than bf16", one.ratio, "times"))
    if one.cosine is not None:
        found.append(row(f"{name}: cosine", one.cosine, ""))
    return [line for line in found if line["value"] is not None]


def row(
    name: str, value: float | None, unit: str, peer_value: float | None = None, *, target: float | None = None
) -> dict[str, Any]:
    """A row whose value should not fall below its target; None where one seed gives no standard error."""
    return {
        "name": name,
        "value": None if value is None else round(value, 5),
        "unit": unit,
        "peer": None if peer_value is None else "original",
        "peer_value": None if peer_value is None else round(peer_value, 5),
        "ratio": round(value / peer_value, 5) if value is not None and peer_value else None,
        "target": target,
        "met": None if target is None or value is None else round(value, 9) >= target,
    }


def markdown(results: Sequence[Results]) -> str:
    """A table for each result."""
    return "\n\n".join(_markdown(result) for result in results) + "\n"


def _markdown(result: Results) -> str:
    original = result.original
    count, seeds = original.outcomes[0].correct.size, len(original.outcomes)
    lines = [
        f"**{result.kind}, {result.task}** ({count:,} rows, {seeds} seed{'s' if seeds > 1 else ''})",
        "",
        "| | accuracy, % | against original, points | NLL | against original | smaller | cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result.measured:
        is_first = one is original
        points, nll = (None, None) if is_first else (result.points(one), result.nll_difference(one))
        cells = [
            one.label.replace("%", " %"),
            _spread(one.accuracy, 2),
            _paired(points, 2),
            _spread(one.nll, 3),
            _paired(nll, 3),
            "" if one.ratio is None else f"{one.ratio:.1f}x",
            "" if one.cosine is None else f"{one.cosine:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(value: Spread, digits: int) -> str:
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def _paired(value: Paired | None, digits: int) -> str:
    """The difference, its standard error over rows, and over seeds where there are several."""
    if value is None:
        return ""
    errors = [f"{error:.{digits}f}" for error in (value.rows, value.seeds) if error is not None]
    # Adding 0 makes a negative zero positive.
    return f"{round(value.mean, digits) + 0.0:+.{digits}f} ± {' / '.join(errors)}"


def _target(result: Results, one: Measured, what: str) -> float | None:
    wanted = result.kind == "demo" and what == "accuracy" and one.label == TARGET_VARIANT
    return -TARGET_POINTS if wanted else None
