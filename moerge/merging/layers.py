"""Which expert each layer of a network comes from, as a text: `0-3,28-31=0; 4-5=average; 6-27=1; other=average`.

A rule gives layers, alone or as ranges, and whose they are: one expert by its position in the recipe, counted from 0;
experts with factors, such as `0*0.5+1*0.5`; or the average of all by their weights. `other` is for layers without a
rule and for tensors that are in no layer, and the average where it is left out. No numpy: web processes check maps too.
"""

import itertools
import re
from dataclasses import dataclass

EXAMPLE = "0-3,28-31=0; 4-5=average; 6-27=1; other=average"
AVERAGE = "average"
LONGEST = 1000

# Position of an expert -> factor on its delta; None is the average of all.
Shares = dict[int, float] | None

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_SHARE = re.compile(r"(\d{1,4})(?:\*(-?\d{1,6}(?:\.\d{1,17})?))?")
_INDEX = re.compile(r"(?:^|\.)(\d{1,4})(?=\.|$)")


@dataclass(frozen=True)
class LayerMap:
    """First layer, last layer and whose they are, in order and without overlap, and whose the rest is."""

    rules: tuple[tuple[int, int, Shares], ...]
    other: Shares = None

    def of(self, name: str) -> Shares:
        """Whose a tensor is, by the first number in its path."""
        found = _INDEX.search(name)
        if found:
            for first, last, shares in self.rules:
                if first <= int(found[1]) <= last:
                    return shares
        return self.other

    @property
    def experts_needed(self) -> int:
        """How many experts there must be for every position to mean one."""
        named = [shares for _, _, shares in self.rules] + [self.other]
        return max((position + 1 for shares in named for position in shares or ()), default=0)

    def __str__(self) -> str:
        """The one text of this map."""
        rules = [
            f"{first}={_text(shares)}" if first == last else f"{first}-{last}={_text(shares)}"
            for first, last, shares in self.rules
        ]
        return "; ".join([*rules, f"other={_text(self.other)}"])


def parse(text: str) -> LayerMap | None:
    """The map that a text means, or None when it means none."""
    if len(text) > LONGEST:
        return None
    rules: list[tuple[int, int, Shares]] = []
    other: list[Shares] = []
    for part in text.replace(" ", "").split(";"):
        where, equals, who = part.partition("=")
        shares = _shares(who)
        if not equals or shares == {}:
            return None
        if where == "other":
            other.append(shares)
            continue
        for item in where.split(","):
            found = _RANGE.fullmatch(item)
            if found is None or int(found[1]) > int(found[2] or found[1]):
                return None
            rules.append((int(found[1]), int(found[2] or found[1]), shares))
    rules.sort(key=lambda rule: rule[:2])
    overlaps = any(one[1] >= after[0] for one, after in itertools.pairwise(rules))
    return None if overlaps or len(other) > 1 else LayerMap(tuple(rules), *other)


def _shares(who: str) -> Shares:
    """Whose some layers are; empty when the text says nobody."""
    if who == AVERAGE:
        return None
    shares: dict[int, float] = {}
    for item in who.split("+"):
        found = _SHARE.fullmatch(item)
        if found is None or int(found[1]) in shares:
            return {}
        shares[int(found[1])] = float(found[2] or 1)
    return shares


def _text(shares: Shares) -> str:
    if shares is None:
        return AVERAGE
    return "+".join(
        str(position) if factor == 1 else f"{position}*{_number(factor)}" for position, factor in sorted(shares.items())
    )


def _number(value: float) -> str:
    """A number without exponent, which reads back as the same."""
    text = repr(value + 0.0)
    return f"{value:.17f}".rstrip("0") if "e" in text else text.removesuffix(".0")
