"""Values of options, and tables of answers: what several commands share."""

import argparse
import re
from collections.abc import Sequence
from math import isfinite

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0, at most 1")
    return value


def seconds(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 to 86400")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def count(text: str) -> int:
    """A count such as 22000000, 22M or 1.5B."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMBT]?)", text.upper())
    if match is None or not (value := round(float(match[1]) * _UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 22000000, 22M or 7B")
    return value


def score(text: str) -> float:
    """A score of routing, 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a score from 0 to 1")
    return value


def results(text: str) -> int:
    """How many experts a hub answers with at most, 1 to 50."""
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= 50):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 50")
    return int(text)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {value}" for name, value in rows]
