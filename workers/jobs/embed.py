"""embed: the vectors of an expert's card, made by the router process, which has the encoder."""

from typing import Any

from registry import selectors
from registry.models import Revision
from registry.services import routing
from workers.runner import NotApplicable, Work


def run(work: Work) -> dict[str, Any]:
    """Store description, centroid and example vectors; a card that did not change is not encoded again."""
    return routing.embed(routable(work))


def routable(work: Work) -> Revision:
    """The revision of the job, when it is one that can be routed. Raises NotApplicable."""
    assert work.lease.revision_id is not None
    revision = Revision.objects.select_related("expert__namespace", "base_model").get(pk=work.lease.revision_id)
    if revision.expert is None:
        raise NotApplicable("A merge is found through its parents.")
    if revision.base_model is None:
        raise NotApplicable("Without a base model there is nothing to route on.")
    if selectors.head(revision.expert) != revision:
        raise NotApplicable("A newer revision is there.")
    return revision
