"""Which experts fit a query: asked of the router process, then checked against the database."""

from typing import Any

from registry import selectors
from registry.models import Expert, RoutingChange, RoutingClock


def router_health() -> dict[str, Any]:
    raise NotImplementedError


def changed(expert: Expert) -> None:
    """Tell the routers that an expert may have become routable or may have left; inside the caller's transaction."""
    head = selectors.routable().filter(expert=expert).first()
    operation = RoutingChange.Operation.REMOVE if head is None else RoutingChange.Operation.PUT
    RoutingClock.objects.get_or_create(pk=1)
    clock = RoutingClock.objects.select_for_update().get(pk=1)
    clock.seq += 1
    clock.save(update_fields=["seq"])
    RoutingChange.objects.create(seq=clock.seq, expert=expert, revision=head, operation=operation)
