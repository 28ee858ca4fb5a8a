"""What people measured with labelled queries against this hub's routing: checked, kept, told to who may know."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from django.db import transaction
from django.db.models import QuerySet

from registry import selectors
from registry.errors import Fault, RequestInvalid
from registry.models import Expert, Method, RoutingClock, RoutingEvaluation, User
from registry.selectors import Viewer
from registry.services import audit, bases

BANDS = ("high", "medium", "low")
DEPTHS = (1, 5, 10)
# Of one person, base model and strategy; older ones make place.
KEPT = 20
_NEAR = 1e-6


def publish(
    *, user: User, base_model: str | None, strategy: str, index_seq: int, figures: Mapping[str, Any]
) -> tuple[RoutingEvaluation, bool]:
    """Keep an evaluation; the second value says whether it is new, for the same one sent again is kept once.

    Confusions that name an expert which the user may not see are left out. Raises BaseUnknown, RequestInvalid for a
    strategy that is not known, a change that has not happened, and figures that contradict each other.
    """
    base = bases.resolve(base_model, pointer="/base_model") if base_model is not None else None
    strategies = list(Method.objects.filter(family=Method.Family.STRATEGY).values_list("name", flat=True))
    if strategy not in strategies:
        raise RequestInvalid(
            "The strategy is not known.", faults=[Fault("/strategy", strategy, strategies, "Choose one of these.")]
        )
    clock = RoutingClock.objects.values_list("seq", flat=True).first() or 0
    if index_seq > clock:
        fault = Fault("/index_seq", index_seq, f"at most {clock}", "Send the index_seq of the hub's answers.")
        raise RequestInvalid("No such state of the index has been.", faults=[fault])
    if faults := list(contradictions(figures)):
        raise RequestInvalid("The figures contradict each other.", faults=faults)
    about = {"base_model": base, "strategy": strategy, "created_by": user}
    kept = {**figures, "confusions": _known(figures["confusions"], user)}
    with transaction.atomic():
        User.objects.select_for_update().get(pk=user.pk)
        own = RoutingEvaluation.objects.filter(**about).order_by("-pk")
        last = own.first()
        if last is not None and (last.index_seq, last.figures) == (index_seq, kept):
            return last, False
        made = RoutingEvaluation.objects.create(**about, index_seq=index_seq, figures=kept)
        RoutingEvaluation.objects.filter(pk__in=list(own.values_list("pk", flat=True)[KEPT:])).delete()
        audit.record(user, "evaluation.publish", f"evaluation {made.pk}", strategy=strategy, base_model=base_model)
    return made, True


def last(*, base_model: str | None = None, strategy: str = "") -> QuerySet[RoutingEvaluation]:
    """Evaluations, newest first; those of one base model by any of its names. Raises BaseUnknown."""
    rows = RoutingEvaluation.objects.select_related("base_model", "created_by").order_by("-pk")
    if base_model:
        rows = rows.filter(base_model=bases.resolve(base_model, pointer="?base_model"))
    return rows.filter(strategy=strategy) if strategy else rows


def told(row: RoutingEvaluation, viewer: Viewer) -> dict[str, Any]:
    """The figures of an evaluation without the experts that the viewer may not see."""
    pairs = row.figures["confusions"]
    ids = {pair[side] for pair in pairs for side in ("gold", "found")}
    visible = Expert.objects.visible_to(viewer).filter(pk__in=ids).select_related("namespace")
    names = {expert.pk: expert.full_name for expert in visible}
    return {
        **row.figures,
        "confusions": [
            {**pair, "gold": names[pair["gold"]], "found": names[pair["found"]]}
            for pair in pairs
            if pair["gold"] in names and pair["found"] in names
        ],
    }


def _known(pairs: list[dict[str, Any]], user: User) -> list[dict[str, Any]]:
    """Confusions by the experts' numbers, which outlive a change of name."""
    names = [pair[side] for pair in pairs for side in ("gold", "found")]
    ids = {expert.full_name.casefold(): expert.pk for expert in selectors.experts_named(names, user)}
    return [
        {**pair, "gold": ids[pair["gold"].casefold()], "found": ids[pair["found"].casefold()]}
        for pair in pairs
        if pair["gold"].casefold() in ids and pair["found"].casefold() in ids
    ]


def contradictions(figures: Mapping[str, Any]) -> Iterator[Fault]:
    """What in an evaluation cannot have been measured together."""
    inside, outside = figures["in_scope"], figures["out_of_scope"]
    if not inside + outside:
        yield _fault("in_scope", 0, "one query at least")
    yield from _presence(figures)
    if inside:
        yield from _order("", figures)
        yield from _of_suites(figures)
    yield from _of_bands(figures)
    if sum(pair["queries"] for pair in figures["confusions"]) > inside:
        yield _fault("confusions", "more queries than there are", f"at most {inside}")


def _presence(figures: Mapping[str, Any]) -> Iterator[Fault]:
    """A figure is there when there are queries that it is about, and only then."""
    has_inside, has_outside = bool(figures["in_scope"]), bool(figures["out_of_scope"])
    of_inside = ["mrr", "kept", *(f"{name}_{depth}" for name in ("recall", "macro_recall") for depth in DEPTHS)]
    needs = dict.fromkeys(of_inside, has_inside) | {
        "auroc": has_inside and has_outside,
        "let_through": has_outside,
        "recall_1_of_kept": bool(figures["kept"]),
    }
    for name, is_due in needs.items():
        if (figures[name] is not None) != is_due:
            yield _fault(name, figures[name], "a share" if is_due else "null, without queries that it is about")


def _order(place: str, own: Mapping[str, Any]) -> Iterator[Fault]:
    recalls = [own[f"recall_{depth}"] for depth in DEPTHS]
    if None in recalls or own["mrr"] is None:
        return
    if recalls != sorted(recalls):
        yield _fault(f"{place}recall_5", recalls, "recalls that grow with depth")
    if not recalls[0] - _NEAR <= own["mrr"] <= (1 + recalls[0]) / 2 + _NEAR:
        # A query whose right expert is not first adds one half at most.
        yield _fault(f"{place}mrr", own["mrr"], "between recall_1 and the middle of recall_1 and 1")


def _of_suites(figures: Mapping[str, Any]) -> Iterator[Fault]:
    suites = figures["suites"]
    counts = [own["queries"] for own in suites]
    if sum(counts) != figures["in_scope"] or len({own["suite"] for own in suites}) != len(suites):
        yield _fault("suites", sum(counts), f"each suite once, {figures['in_scope']} queries together")
        return
    for place, own in enumerate(suites):
        yield from _order(f"suites/{place}/", own)
    for depth in DEPTHS:
        values = [own[f"recall_{depth}"] for own in suites]
        mean = math.fsum(value * count for value, count in zip(values, counts, strict=True)) / figures["in_scope"]
        macro = math.fsum(values) / len(values)
        for name, value in ((f"recall_{depth}", mean), (f"macro_recall_{depth}", macro)):
            if figures[name] is not None and abs(figures[name] - value) > _NEAR:
                yield _fault(name, figures[name], f"{value:.6f}, by the suites")


def _of_bands(figures: Mapping[str, Any]) -> Iterator[Fault]:
    bands = figures["calibration"]
    if [band["confidence"] for band in bands] != list(BANDS):
        yield _fault("calibration", [band["confidence"] for band in bands], list(BANDS))
        return
    for place, band in enumerate(bands):
        if band["right"] > band["in_scope"]:
            yield _fault(f"calibration/{place}/right", band["right"], f"at most {band['in_scope']}")
    for name in ("in_scope", "out_of_scope"):
        if sum(band[name] for band in bands) > figures[name]:
            yield _fault("calibration", sum(band[name] for band in bands), f"{name} of at most {figures[name]}")
    right = sum(band["right"] for band in bands)
    if figures["recall_1"] is not None and abs(right - figures["recall_1"] * figures["in_scope"]) > 0.01:
        yield _fault("calibration", right, f"{figures['recall_1'] * figures['in_scope']:.2f} right, by recall_1")


def _fault(name: str, met: Any, wanted: Any) -> Fault:
    return Fault(f"/figures/{name}", met, wanted, "Send what `moerge eval-router` measured.")
