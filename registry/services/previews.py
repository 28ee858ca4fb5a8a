"""What routing to expect of a card that nobody has uploaded yet: how good it is, and whom its examples would go to."""

from collections.abc import Sequence
from typing import Any

from registry.errors import Fault, QueryInvalid, TooLarge
from registry.models import Revision
from registry.selectors import Viewer
from registry.services import bases, router_link, routing

# Examples on a card, and the R@1 and R@5 that cards of so many reached on the development queries, among 669 cards.
LEVELS = ((0, 0.24, 0.43), (1, 0.43, 0.66), (3, 0.52, 0.73), (5, 0.54, 0.75))

_WINNERS = 3


def preview(
    *,
    viewer: Viewer,
    base_model: str,
    name: str,
    description: str = "",
    examples: Sequence[str] = (),
    instruction: str = "",
    tags: Sequence[str] = (),
) -> dict[str, Any]:
    """What `POST /api/v1/route/preview` answers; nothing is stored.

    Each example is asked while the card lacks it, against the experts of the base that the caller may see; others are
    neither named nor counted. Where `name` is owner/name, the expert of that name, which the draft would replace, is
    left out. Raises QueryInvalid, TooLarge, BaseUnknown, and IndexNotReady when the router is away or loading.
    """
    base = bases.resolve(base_model, pointer="/base_model")
    _check("/name", name)
    for pointer, text in (("/description", description), ("/instruction", instruction)):
        _check(pointer, text, is_needed=False)
    for place, text in enumerate(examples):
        _check(f"/examples/{place}", text)
    if len(examples) > routing.MAX_TEXTS:
        raise _invalid("Too many examples.", "/examples", len(examples), f"at most {routing.MAX_TEXTS}")
    found = router_link.preview(
        {
            "base_model": base.name,
            "expert": name,
            "name": name.rpartition("/")[2],
            "description": description,
            "examples": list(examples),
            "instruction": instruction,
            "tags": list(tags),
        }
    )
    standings = found["standings"]
    rows = routing.visible(viewer, base, (rival["revision"] for one in standings for rival in one["rivals"]))
    texts = [_text(index, standing, rows) for index, standing in enumerate(standings)]
    levels = [{"examples": count, "recall_1": first, "recall_5": fifth} for count, first, fifth in LEVELS]
    return {
        "quality": "low" if not examples else "fair" if len(examples) < LEVELS[-1][0] else "good",
        "expected": [level for level in levels if level["examples"] <= len(examples)][-1],
        "levels": levels,
        "texts": texts,
        "routed": sum(text["would_be_routed"] for text in texts),
        "index_seq": found["seq"],
    }


def _text(index: int, standing: dict[str, Any], rows: dict[int, Revision]) -> dict[str, Any]:
    winners = [
        {"expert": rows[rival["revision"]].expert.full_name, "score": rival["score"]}  # type: ignore[union-attr]
        for rival in standing["rivals"]
        if rival["revision"] in rows
    ]
    return {
        "index": index,
        "rank": 1 + len(winners),
        "score": standing["score"],
        "would_be_routed": not winners and standing["score"] >= standing["min_score"],
        "winners": winners[:_WINNERS],
    }


def _check(pointer: str, text: str, *, is_needed: bool = True) -> None:
    if is_needed and not text.strip():
        raise _invalid("A text is empty.", pointer, "", "a text with a visible character")
    if len(text) > routing.MAX_CHARACTERS:
        wanted = f"at most {routing.MAX_CHARACTERS} characters"
        raise TooLarge("A text is too long.", faults=[Fault(pointer, len(text), wanted, "Keep what tells the task.")])


def _invalid(detail: str, pointer: str, met: object, wanted: object) -> QueryInvalid:
    return QueryInvalid(detail, faults=[Fault(pointer, met, wanted, "Correct this field.")])
