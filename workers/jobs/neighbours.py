"""Neighbours: measure how near the weights of a revision lie to those that its sketch says are nearest."""

from contextlib import ExitStack
from typing import Any

from moerge.routing import fingerprints as measures
from registry.errors import FileNotFound
from registry.models import Revision
from registry.services import neighbours
from workers.jobs import prototypes
from workers.runner import NotApplicable, Work


def run(work: Work) -> dict[str, Any]:
    """Exact cosines with the nearest revisions on the base, kept from a floor on. A second run finds the same."""
    assert work.lease.revision_id is not None
    revision = Revision.objects.get(pk=work.lease.revision_id)
    if revision.expert_id is None or revision.base_model_id is None:
        raise NotApplicable("A merge is known by its parents.")
    others = Revision.objects.in_bulk(neighbours.candidates(revision))
    found = {}
    for place, (number, other) in enumerate(others.items()):
        work.progress(place / len(others), "Comparing weights")
        try:
            with ExitStack() as opened:
                own, _ = prototypes.open_revision(revision, opened)
                theirs, _ = prototypes.open_revision(other, opened)
                likeness = measures.compare(own.modules, theirs.modules)
        except FileNotFound:
            continue
        if likeness.ratio:
            found[number] = (likeness.cosine, likeness.ratio)
    return {"measured": len(found), "kept": neighbours.record(revision, found)}
