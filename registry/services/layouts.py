"""What modules an adapter has, of which shape and rank, written down so small that a row can hold it.

Modules whose names differ in numbers alone, with the same shape and rank, share one line; their numbers are runs such
as `3.0-127`. So an adapter of a mixture of experts with eighteen thousand modules takes some kilobytes, not megabytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from registry.services.bases import pattern_of

# Pattern, d_out, d_in, rank, and the runs of numbers that stand for its stars.
Line = tuple[str, int, int, int, list[str]]


@dataclass(frozen=True)
class Module:
    """One module whose delta can be formed; `shape` is (d_out, d_in)."""

    shape: tuple[int, int]
    rank: int


def pack(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> list[Line]:
    """Modules by name as lines; `unpack` reads them back."""
    groups: dict[tuple[str, int, int, int], list[list[str]]] = {}
    for name, (d_out, d_in) in shapes.items():
        pattern = pattern_of(name)
        numbers = [part for part, star in zip(name.split("."), pattern.split("."), strict=True) if star == "*"]
        groups.setdefault((pattern, d_out, d_in, ranks.get(name, 0)), []).append(numbers)
    return [(*key, _runs(fillings)) for key, fillings in sorted(groups.items())]


def unpack(lines: Sequence[Line]) -> Mapping[str, Module]:
    """Every module by name. Experts of one base often have the same lines, and then share one answer."""
    return _unpacked(json.dumps(lines))


@lru_cache(maxsize=16)
def _unpacked(text: str) -> Mapping[str, Module]:
    found: dict[str, Module] = {}
    for pattern, d_out, d_in, rank, runs in json.loads(text):
        module = Module((d_out, d_in), rank)
        if not runs:
            found[pattern] = module
        for run in runs:
            for numbers in _spelled(run):
                filling = iter(numbers)
                name = ".".join(next(filling, part) if part == "*" else part for part in pattern.split("."))
                found[name] = module
    return found


def _runs(fillings: list[list[str]]) -> list[str]:
    """The numbers of one line: all but the last as they are, the last as runs. Empty for a pattern without stars."""
    lasts: dict[str, list[str]] = {}
    for *first, last in filter(None, fillings):
        lasts.setdefault(".".join([*first, ""]), []).append(last)
    return [start + run for start, numbers in lasts.items() for run in _spans(numbers)]


def _spans(numbers: list[str]) -> Iterator[str]:
    # What `str` would not write, such as a leading zero, is kept as it is.
    names = {number for number in numbers if not number.isascii() or str(int(number)) != number}
    values = sorted(int(number) for number in numbers if number not in names)
    start = 0
    for place, value in enumerate(values):
        if place + 1 == len(values) or values[place + 1] != value + 1:
            yield f"{values[start]}-{value}" if value > values[start] else str(value)
            start = place + 1
    yield from sorted(names)


def _spelled(run: str) -> Iterator[list[str]]:
    *first, last = run.split(".")
    low, _, high = last.partition("-")
    if not high:
        yield [*first, last]
        return
    for number in range(int(low), int(high) + 1):
        yield [*first, str(number)]
