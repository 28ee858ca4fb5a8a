"""Neighbours: experts of one base whose weights point the same way, found by sketches, measured by their files; and
experts whose cards say the same.

Everything is measured whoever may see it; what is told passes through the eyes of the caller.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from django.db.models import Q

from registry.errors import BaseUnknown, IndexNotReady, QueryInvalid, TooLarge
from registry.jobs import JobKind
from registry.models import Expert, Fingerprint, Job, Neighbour, Revision
from registry.selectors import Viewer
from registry.services import fingerprints, routing

# Of so many the exact cosine is measured, and kept from this floor on; unrelated adapters of one base lie below it.
MEASURED = 20
FLOOR = 0.1
# From here on two adapters are the same weights: what rounding to half precision leaves of a copy.
SAME_COSINE, SAME_RATIO = 0.9999, 1e-3
SHOWN = 10


def of(revision: Revision, viewer: Viewer) -> dict[str, Any]:
    """All that is told of a revision's neighbours to a viewer."""
    return {**near(revision, viewer), "by_text": by_text(revision, viewer)}


def near(revision: Revision, viewer: Viewer) -> dict[str, Any]:
    """Neighbours by weights alone, which takes the database and nothing else."""
    return {**state(revision), "by_weights": by_weights(revision, viewer)}


def candidates(revision: Revision) -> list[int]:
    """The revisions that lie nearest by their sketches, one for each other expert on the base, nearest first.

    The nearest of all and the nearest public ones, so that what somebody has in private keeps nobody from being found.
    """
    own = Fingerprint.objects.filter(revision=revision).exclude(sketch=b"").first()
    if own is None:
        return []
    sketch = fingerprints.of_bytes(own.sketch)
    best: dict[int, tuple[float, int, bool]] = {}
    for other in fingerprints.sketches(revision):
        # Rounded, so that of equal revisions the newest, which comes first, stays.
        cosine = round(float(sketch @ other.sketch), 3)
        if other.expert_id not in best or cosine > best[other.expert_id][0]:
            best[other.expert_id] = (cosine, other.revision_id, other.is_public)
    nearest = sorted(best.values(), key=lambda found: (-found[0], -found[1]))
    chosen = nearest[:MEASURED] + [found for found in nearest if found[2]][:MEASURED]
    return list(dict.fromkeys(number for _, number, _ in chosen))


def record(revision: Revision, found: Mapping[int, tuple[float, float]]) -> int:
    """Keep cosine and ratio of norms of a revision to others, by their numbers; returns how many are near enough."""
    rows = []
    for other, (cosine, ratio) in sorted(found.items()):
        if cosine >= FLOOR:
            pair = (revision.pk, other) if revision.pk < other else (other, revision.pk)
            rows.append(Neighbour(first_id=pair[0], second_id=pair[1], cosine=cosine,
                                  ratio=ratio if revision.pk < other else 1 / ratio))  # fmt: skip
    Neighbour.objects.bulk_create(
        rows, update_conflicts=True, unique_fields=["first", "second"], update_fields=["cosine", "ratio"]
    )
    return len(rows)


def by_weights(revision: Revision, viewer: Viewer) -> list[dict[str, Any]]:
    """Experts whose weights lie near those of a revision, nearest first; only those that the viewer may see.

    `ratio` is the norm of this revision's delta over that of the other one.
    """
    rows = Neighbour.objects.filter(Q(first=revision) | Q(second=revision)).order_by("-cosine", "-pk")
    pairs = [
        (row.second_id, row.cosine, row.ratio)
        if row.first_id == revision.pk
        else (row.first_id, row.cosine, 1 / row.ratio)
        for row in rows
    ]
    seen = _visible(viewer, revision, (number for number, _, _ in pairs))
    told: dict[int, dict[str, Any]] = {}
    for number, cosine, ratio in sorted(pairs, key=lambda pair: (-round(pair[1], 6), -pair[0])):
        other = seen.get(number)
        if other is None or other.expert is None or other.expert_id in told:
            continue
        told[other.expert.pk] = {
            "expert": other.expert.full_name,
            "revision": other.commit,
            "cosine": round(cosine, 6),
            "ratio": round(ratio, 6),
            "same": cosine >= SAME_COSINE and abs(ratio - 1) <= SAME_RATIO,
        }
    return list(told.values())[:SHOWN]


def same(revision: Revision, viewer: Viewer) -> list[str]:
    """The experts that the viewer may see whose weights do the same as those of a revision."""
    return [row["expert"] for row in by_weights(revision, viewer) if row["same"]]


def _seen_from(revision: Revision, row: Neighbour) -> tuple[int, float, float]:
    """The other revision, the cosine, and the norm of this delta over that of the other."""
    if row.first_id == revision.pk:
        return row.second_id, row.cosine, row.ratio
    return row.first_id, row.cosine, 1 / row.ratio


def by_text(revision: Revision, viewer: Viewer) -> list[dict[str, Any]]:
    """Experts of the base whose cards fit the description best; none while the router is away."""
    expert = revision.expert
    if expert is None or revision.base_model is None or not expert.description.strip():
        return []
    text = f"{expert.name}. {expert.description}"[: routing.MAX_CHARACTERS]
    try:
        found = routing.route(
            viewer=viewer, text=text, base_model=revision.base_model.name, top_k=SHOWN + 1, min_score=0.0
        )
    except (IndexNotReady, QueryInvalid, TooLarge, BaseUnknown):
        return []
    return [
        {"expert": hit["expert"], "revision": hit["revision"], "score": hit["score"]}
        for hit in found["results"]
        if hit["expert"] != expert.full_name
    ][:SHOWN]


def state(revision: Revision) -> dict[str, str]:
    """`ready`, `pending` while the weights are being measured, or `none` with the reason why there is nothing to."""
    row = Fingerprint.objects.filter(revision=revision).first()
    job = Job.objects.filter(revision=revision, kind=JobKind.NEIGHBOURS).first()
    if row is not None and not row.sketch:
        return {"state": "none", "reason": row.facts.get("reason", "")}
    if row is not None and job is not None and job.state in Job.PASSED:
        return {"state": "ready", "reason": ""}
    waiting = Job.objects.filter(revision=revision, kind__in=[JobKind.PROTOTYPES, JobKind.NEIGHBOURS])
    if revision.state != Revision.State.PROCESSING and not waiting.exclude(state__in=Job.FINISHED).exists():
        return {"state": "none", "reason": "The weights were not measured."}
    return {"state": "pending", "reason": ""}


def _visible(viewer: Viewer, revision: Revision, numbers: Iterable[int]) -> dict[int, Revision]:
    """Of these revisions those on the same base whose expert the viewer may see and nobody yanked."""
    seen = Expert.objects.visible_to(viewer).filter(yanked_at=None).exclude(pk=revision.expert_id or 0)
    rows = Revision.objects.filter(pk__in=set(numbers), expert__in=seen, base_model=revision.base_model_id)
    return {row.pk: row for row in rows.select_related("expert__namespace")}
