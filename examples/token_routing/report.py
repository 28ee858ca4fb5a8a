"""The tables of the results, in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from examples.token_routing import tasks

Found = Mapping[str, Any]


def tables(found: Mapping[str, Found]) -> str:
    """All tables of the results by seed."""
    seeds = list(found.values())
    alone = list(tasks.BY_NAME)
    composed = list(tasks.COMPOSITIONS)
    return "\n\n".join(
        (
            "### Inputs of one task: whole answers right, %",
            _table("method", _rows(seeds, alone, "whole"), [*alone, "mean"]),
            "### Compositions: whole answers right, %",
            _table("method", _rows(seeds, composed, "whole"), [*composed, "mean"]),
            "### Compositions: words right, %",
            _table("method", _rows(seeds, composed, "words"), [*composed, "mean"]),
            "### The right expert's share of the weight, % (each of six alike: 16.7)",
            _table("strategy", _right(seeds, [*alone, *composed]), [*alone, *composed, "mean"]),
            "### Who is used where in inputs of two halves, % of the weight: first half's expert / second half's",
            _table("strategy, input", _halves(seeds), tasks.SEGMENTS),
        )
    )


def _rows(seeds: Sequence[Found], sets: Sequence[str], figure: str) -> dict[str, list[str]]:
    told = {}
    for row in seeds[0]["rows"]:
        if all(name in seeds[0]["rows"][row] for name in sets):
            told[row] = _cells(seeds, sets, lambda seed, name, row=row: seed["rows"][row][name][figure])
    retrieved = _cells(seeds, sets, lambda seed, name: seed["retrieved"][name])
    return told | {"(retrieval finds an expert that is needed)": retrieved}


def _right(seeds: Sequence[Found], sets: Sequence[str]) -> dict[str, list[str]]:
    names = [name for name in seeds[0] if name.startswith("use of ")]
    return {
        name.removeprefix("use of "): _cells(seeds, sets, lambda seed, task, name=name: seed[name]["right"][task])
        for name in names
    }


def _cells(seeds: Sequence[Found], sets: Sequence[str], value: Callable[[Found, str], float]) -> list[str]:
    """A cell for each set, then one for the mean of the sets."""
    by_set = [[value(seed, name) for seed in seeds] for name in sets]
    return [spread(values) for values in (*by_set, [mean(values) for values in zip(*by_set, strict=True)])]


def spread(shares: Sequence[float]) -> str:
    """Mean and standard deviation of shares over the seeds, in per cent; of one seed the share alone."""
    middle = f"{100 * mean(shares):.1f}"
    return f"{middle} ± {100 * stdev(shares):.1f}" if len(shares) > 1 else middle


def _halves(seeds: Sequence[Found]) -> dict[str, list[str]]:
    told = {}
    for name in [name for name in seeds[0] if name.startswith("use of ")]:
        for composition in seeds[0][name]["halves"]:
            shares = [seed[name]["halves"][composition] for seed in seeds]
            told[f"{name.removeprefix('use of ')}, {composition}"] = [
                " / ".join(f"{100 * mean(one[segment][half] for one in shares):.0f}" for half in ("first", "second"))
                for segment in tasks.SEGMENTS
            ]
    return told


def _table(first: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])
