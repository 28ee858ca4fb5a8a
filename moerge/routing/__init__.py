"""Routing: which experts fit a query. `catalogue()` names the strategies."""

from functools import cache
from types import ModuleType

from moerge import table
from moerge.routing import strategies


@cache
def catalogue() -> dict[str, ModuleType]:
    """Strategy name -> its module, which has SPEC and score(query, candidates)."""
    return table.load(strategies)
