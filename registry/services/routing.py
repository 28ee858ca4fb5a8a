"""Which experts fit a query: asked of the router process, then checked against the database."""

from typing import Any


def router_health() -> dict[str, Any]:
    raise NotImplementedError
