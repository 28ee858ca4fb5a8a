"""index: tell the routers that an expert can be routed."""

from typing import Any

from registry.services import describing, routing
from workers.jobs import embed
from workers.runner import NotApplicable, Work


def run(work: Work) -> dict[str, Any]:
    """Publish the revision under the next number of the routing clock, which callers may name as `min_seq`."""
    revision = embed.routable(work)
    # Nothing to do as a rule; the card may have been re-worded since the embed job.
    routing.embed(revision)
    seq = routing.publish_to_index(revision)
    if seq is None:
        raise NotApplicable("The expert was taken out, or a newer revision is there.")
    describing.enqueue(revision)
    return {"index_seq": seq}
