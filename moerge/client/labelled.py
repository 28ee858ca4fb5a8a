"""Labelled queries, JSON lines: what is asked, and the expert that ought to come first."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.client.asking import MOST_CHARACTERS
from moerge.errors import QueryInvalid
from moerge.tensors import strict

MOST_LINES = 100_000
MOST_BYTES = 256 * 2**20
MOST_SUITES = 64
FIELDS = ("id", "q", "text", "gold", "suite", "tag")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A query and its experts, any of which is right; none where no expert fits."""

    id: str | int
    text: str
    gold: frozenset[str]
    suite: str


@dataclass(frozen=True)
class _Line:
    path: Path
    number: int

    def wrong(self, name: str, met: object, wanted: str, remedy: str) -> QueryInvalid:
        shown = ascii(met)[:80]
        return QueryInvalid(
            f"{self.path}, line {self.number}{f', {name}' if name else ''}: met {shown}, wanted {wanted}.",
            pointer=f"/{self.number}/{name}".rstrip("/"), met=shown, wanted=wanted, remedy=remedy,
        )  # fmt: skip


def read(path: Path) -> tuple[Labelled, ...]:
    """All queries of a file. Raises QueryInvalid with line and field, OSError."""
    if path.stat().st_size > MOST_BYTES:
        raise QueryInvalid(
            f"{path} is too large.", pointer=str(path), met=f"{path.stat().st_size} bytes",
            wanted=f"at most {MOST_BYTES} bytes", remedy="Measure with fewer queries.",
        )  # fmt: skip
    found = tuple(_queries(path, path.read_bytes()))
    if not found:
        raise QueryInvalid(
            f"{path} holds no query.", pointer=str(path), met="no line", wanted="one JSON object a line",
            remedy='Write lines like {"q": "my card was swallowed", "gold": "ann/bank"}.',
        )  # fmt: skip
    suites = {query.suite for query in found}
    if len(suites) > MOST_SUITES:
        raise QueryInvalid(
            f"{path} names {len(suites)} suites.", pointer="/suite", met=len(suites), wanted=f"at most {MOST_SUITES}",
            remedy="Give the same suite to queries of one kind.",
        )  # fmt: skip
    return found


def _queries(path: Path, data: bytes) -> Iterator[Labelled]:
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not text.strip():
            continue
        at = _Line(path, line)
        if line > MOST_LINES:
            raise at.wrong("", "one more line", f"at most {MOST_LINES} lines", "Measure with fewer queries.")
        try:
            record = strict.loads(text, max_keys=1000, max_depth=8)
        except strict.Malformed as error:
            raise at.wrong("", str(error), "a JSON object", "Write one object a line.") from error
        if not isinstance(record, dict):
            raise at.wrong("", type(record).__name__, "a JSON object", "Write one object a line.")
        yield _query(at, record)


def _query(at: _Line, record: dict[str, Any]) -> Labelled:
    if unknown := sorted(set(record) - set(FIELDS)):
        raise at.wrong(unknown[0], "an unknown field", f"one of {', '.join(FIELDS)}", "Take it out.")
    if "q" in record and "text" in record:
        raise at.wrong("text", "both q and text", "one of them", "Take one out.")
    name = "text" if "text" in record else "q"
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        raise at.wrong(name, text, "a text with a visible character", "Write what is asked.")
    if len(text) > MOST_CHARACTERS:
        raise at.wrong(name, f"{len(text)} characters", f"at most {MOST_CHARACTERS}", "Shorten it.")
    if "gold" not in record:
        raise at.wrong("gold", "nothing", "owner/name, a list of them, or null", "null: no expert fits.")
    suite = record.get("suite", "all")
    if not isinstance(suite, str) or not 1 <= len(suite) <= 40:
        raise at.wrong("suite", suite, "a text of at most 40 characters", "Shorten it, or leave it out.")
    own = record.get("id", at.number)
    return Labelled(
        id=own if isinstance(own, str | int) else at.number,
        text=text,
        gold=_gold(at, record["gold"]),
        suite=suite,
    )


def _gold(at: _Line, gold: Any) -> frozenset[str]:
    names = [] if gold is None else [gold] if isinstance(gold, str) else gold
    if not isinstance(names, list) or (gold is not None and not 1 <= len(names) <= 32):
        raise at.wrong("gold", gold, "owner/name, a list of 1 to 32 of them, or null", "null: none fits.")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise at.wrong("gold", name, "owner/name", "Write it as it stands on the expert's page.")
    return frozenset(name.casefold() for name in names)
