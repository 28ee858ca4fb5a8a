"""Lists as {items, next}: `next` is the address of the following page, or null."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from django.db.models import QuerySet
from rest_framework.request import Request

from registry.errors import Fault, RequestInvalid

LARGEST_PAGE = 200


def whole_number(request: Request, name: str, default: int, *, least: int, most: int) -> int:
    """A query parameter that must be a whole number in a range. Raises RequestInvalid."""
    text = request.query_params.get(name, "")
    if text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise RequestInvalid(
            f"The query parameter {name} is not valid.",
            faults=[
                Fault(
                    f"?{name}", text[:40], f"a whole number from {least} to {most}", f"Leave {name} out or correct it."
                )
            ],
        )
    return int(text)


def page(request: Request, rows: "QuerySet[Any]", record: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """One page of an ordered query; `?limit=` and `?cursor=` choose it."""
    limit = whole_number(request, "limit", 50, least=1, most=LARGEST_PAGE)
    start = whole_number(request, "cursor", 0, least=0, most=10**8)
    found = list(rows[start : start + limit + 1])
    following = None
    if len(found) > limit:
        query = {**{key: request.query_params.getlist(key) for key in request.query_params}, "cursor": start + limit}
        following = request.build_absolute_uri(f"{request.path}?{urlencode(query, doseq=True)}")
    return {"items": [record(row) for row in found[:limit]], "next": following}
