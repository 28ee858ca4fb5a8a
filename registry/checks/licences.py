"""What the licences of several parents say about their merge. Information, not legal advice.

Which identifier belongs to which class, and which share-alike licence accepts which, is data (registry/data).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data" / "licences.json"
OK, WARN, BLOCK = "ok", "warn", "block"
PERMISSIVE, SHARE_ALIKE, NON_COMMERCIAL = "permissive", "share-alike", "non-commercial"
USE_RESTRICTED, NO_DERIVATIVES, UNKNOWN = "use-restricted", "no-derivatives", "unknown"
# From what leaves most freedom to what leaves least.
CLASSES = (PERMISSIVE, SHARE_ALIKE, UNKNOWN, USE_RESTRICTED, NON_COMMERCIAL, NO_DERIVATIVES)
OTHER = "other"
_LATER = "-or-later"

Named = tuple[str, str]  # whose licence it is, and its identifier or tag


@dataclass(frozen=True)
class Licence:
    """One licence of one parent: an identifier in its normal form, without `-only` and `-or-later`."""

    owner: str
    identifier: str
    kind: str
    is_or_later: bool = False

    @property
    def versions(self) -> tuple[str, ...]:
        """The licences under which its holder lets it be passed on."""
        later: Mapping[str, list[str]] = _data()["or_later"]
        return tuple(later.get(self.identifier, [self.identifier])) if self.is_or_later else (self.identifier,)

    def __str__(self) -> str:
        return f"{self.identifier or 'no licence'}{_LATER if self.is_or_later else ''}"


@dataclass(frozen=True)
class Reason:
    """Why a verdict is not `ok`: whose licences, which rule, and the sentence that says so."""

    verdict: str
    parents: tuple[str, ...]
    rule: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What licences say together.

    `licence` is the one under which the result can be passed on, `other` where several hold at once or one is not
    known; `classes` are those whose rules hold for it, `carried` the licences whose conditions it carries on, `notices`
    name the licence of every parent.
    """

    verdict: str
    licence: str
    classes: tuple[str, ...]
    carried: tuple[str, ...]
    reasons: tuple[Reason, ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "verdict": self.verdict,
            "licence": self.licence,
            "classes": list(self.classes),
            "carried": list(self.carried),
            "reasons": [
                {"verdict": item.verdict, "parents": list(item.parents), "rule": item.rule, "detail": item.detail}
                for item in self.reasons
            ],
            "notices": list(self.notices),
        }


def verdict(parents: Sequence[Named], base: Named | None, wanted: str | None = None) -> Verdict:
    """Whether experts with these licences may be merged, and under what. `wanted` is a label somebody wants to give."""
    named = [*parents, *([base] if base is not None else [])]
    found = [licence for owner, text in named for licence in read(owner, text)]
    reasons = [*_of_each(found), *_of_pairs(found), *_of_all(found)]
    if wanted:
        reasons += _of_label(found, wanted)
    worst = max((item.verdict for item in reasons), key=(OK, WARN, BLOCK).index, default=OK)
    return Verdict(
        verdict=worst,
        licence=normal(wanted) if wanted and worst != BLOCK else _result(found),
        classes=tuple(name for name in CLASSES if any(item.kind == name for item in found)),
        carried=tuple(dict.fromkeys(str(item) for item in found if item.kind not in {PERMISSIVE, UNKNOWN})),
        reasons=tuple(dict.fromkeys(reasons)),
        notices=tuple(f"{owner}: {text or 'no licence stated'}" for owner, text in named),
    )


def of_upload(licence: str, base: Named | None) -> list[str]:
    """What to warn of when an expert comes with this licence for this base."""
    if all(item.kind == UNKNOWN for item in read("", licence)):
        said = f"The licence {licence!r} is not known here" if normal(licence) else "The card states no licence"
        return [f"{said}: whoever merges this expert is told so, and may have to take responsibility for it."]
    if base is None:
        return []
    label = _of_label(list(read(*base)), licence)
    pairs = _of_pairs([*read("This expert", licence), *read(*base)])
    return [f"The licence contradicts that of the base model: {item.detail}" for item in [*label, *pairs]][:1]


@cache
def normal(text: str) -> str:
    """An identifier as the tables have it: lower case, hyphens, no version marks such as `-only`."""
    return _identify(text)[0]


def class_of(text: str) -> str:
    """The class of one identifier."""
    return _class(normal(text))


def read(owner: str, text: str) -> Iterator[Licence]:
    """The licences that hold at once. Of `a or b` the one that leaves more freedom holds."""
    parts = re.split(r"\s+and\s+|,|&", text.casefold().replace("(", " ").replace(")", " "))
    for part in [part for part in parts if part.strip()] or [""]:
        choices = [_licence(owner, choice) for choice in re.split(r"\s+or\s+", part.strip())]
        yield min(choices, key=lambda item: CLASSES.index(item.kind))


def _licence(owner: str, text: str) -> Licence:
    identifier, is_later = _identify(text)
    return Licence(owner, identifier, _class(identifier), is_later)


@cache
def _identify(text: str) -> tuple[str, bool]:
    """(identifier, whether later versions are allowed too)."""
    words = re.sub(r"[\s_/]+", "-", re.split(r"\s+with\s+", text.casefold().strip())[0])
    words = re.sub(r"-(licen[cs]e|public|community|agreement|version|international|unported)(?=-|$)", "", words)
    words = words.removeprefix("the-").removeprefix("gnu-").removeprefix("licenseref-").strip("-")
    is_later = words.endswith((_LATER, "+")) and not words.startswith("openrail")
    words = words.removesuffix(_LATER).removesuffix("-only").rstrip("+")
    alias: str = _data()["aliases"].get(words, words)
    return alias.removesuffix(_LATER), is_later or alias.endswith(_LATER)


@cache
def _class(identifier: str) -> str:
    for row in _data()["classes"]:
        if _matches(identifier, row["identifiers"]):
            return str(row["name"])
    return UNKNOWN


def _of_each(found: Iterable[Licence]) -> Iterator[Reason]:
    for item in found:
        if item.kind == NO_DERIVATIVES:
            yield Reason(BLOCK, (item.owner,), NO_DERIVATIVES, f"{item.owner} is under {item}, which allows no merge.")
        if item.kind == UNKNOWN:
            said = f"is under {item}, which is not known here" if item.identifier else "states no licence"
            yield Reason(WARN, (item.owner,), UNKNOWN, f"{item.owner} {said}.")


def _of_pairs(found: Sequence[Licence]) -> Iterator[Reason]:
    for one, other in combinations(found, 2):
        for first, second in ((one, other), (other, one)):
            if first.kind == SHARE_ALIKE and _forbids(first, second):
                yield _pair(one, other, f"{first} allows no further restrictions, and {second} has some")
        if one.kind == other.kind == SHARE_ALIKE and _strongest([one, other]) is None:
            yield _pair(one, other, "each wants the result under its own terms, and neither accepts the other's")


def _of_all(found: Sequence[Licence]) -> Iterator[Reason]:
    """Where every two get along but no licence accepts all."""
    alike = [item for item in found if item.kind == SHARE_ALIKE]
    if all(_strongest(pair) for pair in combinations(alike, 2)) and alike and _strongest(alike) is None:
        names = ", ".join(f"{item.owner} ({item})" for item in alike)
        detail = f"No one licence accepts all of {names}."
        yield Reason(BLOCK, tuple(item.owner for item in alike), SHARE_ALIKE, detail)


def _of_label(found: Sequence[Licence], wanted: str) -> Iterator[Reason]:
    """Whether something under these licences may be passed on under a label."""
    labels = list(read("the label", wanted))
    for label in labels:
        if label.kind == UNKNOWN:
            yield Reason(WARN, (), UNKNOWN, f"The label {wanted} is not known here.")
            return
    for item in found:
        if not any(_carries(label, item) for label in labels):
            detail = f"{item.owner} is under {item} ({item.kind}), which the label {wanted} does not carry on."
            yield Reason(BLOCK, (item.owner,), f"{item.kind} relabelled", detail)


def _carries(label: Licence, item: Licence) -> bool:
    """Whether what a licence asks for is also asked for by the label."""
    if item.kind == SHARE_ALIKE:
        return label.kind == SHARE_ALIKE and _accepts(label.versions, item)
    if item.kind == NON_COMMERCIAL:
        return label.kind in {NON_COMMERCIAL, NO_DERIVATIVES}
    return item.kind != USE_RESTRICTED or label.identifier == item.identifier


def _pair(one: Licence, other: Licence, why: str) -> Reason:
    detail = f"{one.owner} is under {one} and {other.owner} under {other}: {why}."
    return Reason(BLOCK, (one.owner, other.owner), f"{one.kind} with {other.kind}", detail)


def _forbids(alike: Licence, other: Licence) -> bool:
    table = {USE_RESTRICTED: "forbid_restrictions_of_use", NON_COMMERCIAL: "forbid_restrictions_of_trade"}
    return other.kind in table and _matches(alike.identifier, _data()[table[other.kind]])


def _strongest(alike: Sequence[Licence]) -> str | None:
    """The weakest share-alike licence that accepts all of these; None when there is none."""
    candidates = {version for item in alike for version in item.versions}
    order = [*_data()["accepts"], *sorted(candidates - _data()["accepts"].keys())]
    return next((name for name in order if name in candidates and all(_accepts((name,), item) for item in alike)), None)


def _accepts(names: Iterable[str], item: Licence) -> bool:
    """Whether something under `item` may be passed on under one of `names`."""
    accepts: Mapping[str, list[str]] = _data()["accepts"]
    return any(version == name or version in accepts.get(name, []) for name in names for version in item.versions)


def _result(found: Sequence[Licence]) -> str:
    kinds = {item.kind for item in found}
    binding = kinds & {SHARE_ALIKE, NON_COMMERCIAL, USE_RESTRICTED, NO_DERIVATIVES}
    if UNKNOWN in kinds or len(binding) > 1:
        return OTHER
    if binding == {SHARE_ALIKE}:
        return _strongest([item for item in found if item.kind == SHARE_ALIKE]) or OTHER
    if binding == {NON_COMMERCIAL}:
        names = {item.identifier for item in found if item.kind == NON_COMMERCIAL}
        return max(names, key=lambda name: ("-sa" in name, name))
    names = {item.identifier for item in found if item.kind in (binding or {PERMISSIVE})}
    if binding:
        return names.pop() if len(names) == 1 else OTHER
    # All permissive: the one that asks for most, so that its notices are kept.
    order: list[str] = next(row["identifiers"] for row in _data()["classes"] if row["name"] == PERMISSIVE)
    demanding = ["cc-by-4.0", "cc-by-3.0", "apache-2.0", *order]
    return min(names, key=demanding.index) if names else OTHER


def _matches(identifier: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(identifier, pattern) for pattern in patterns)


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found
