"""The line from web and workers to the router process: kept-alive HTTP, JSON both ways, a shared secret."""

import atexit
import base64
import json
from functools import cache
from typing import Any

import httpx
import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from registry.errors import Fault, IndexNotReady, QueryInvalid, RouterBusy, Unavailable

SECRET_HEADER = "X-Router-Secret"  # noqa: S105  # The header's name.
RETRY_SECONDS = 2
HEALTH_SECONDS = 2.0

# Servers close idle connections after two seconds; a client that lets go first never writes into a closed one.
_KEEPALIVE_SECONDS = 1.5


def route(body: dict[str, Any]) -> dict[str, Any]:
    """Rankings of texts, as `registry.services.router.Router.route` answers them."""
    return _ask("POST", "/route", body=body, seconds=settings.HUB_ROUTER_TIMEOUT_SECONDS)


def preview(body: dict[str, Any]) -> dict[str, Any]:
    """Where a draft of a card would stand, as `registry.services.router.Router.preview` answers it."""
    return _ask("POST", "/preview", body=body, seconds=settings.HUB_ROUTER_TIMEOUT_SECONDS)


def encode(texts: list[str], *, encoder_id: str) -> NDArray[np.float32]:
    """The unit vectors of texts of cards, (n, d). Raises IndexNotReady while that encoder loads."""
    # A card of 33 long texts takes seconds on a busy core; nobody waits at a page for it.
    seconds = 60 + settings.HUB_ROUTER_TIMEOUT_SECONDS
    answer = _ask("POST", "/encode", body={"texts": texts, "encoder": encoder_id}, seconds=seconds)
    rows = np.frombuffer(base64.b64decode(answer["vectors"]), dtype="<f4")
    return rows.reshape(len(texts), -1)


def health() -> dict[str, Any]:
    """What the router says of itself. Raises IndexNotReady when it does not answer."""
    return _ask("GET", "/health", body=None, seconds=HEALTH_SECONDS)


@cache
def _client() -> httpx.Client:
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=_KEEPALIVE_SECONDS)
    # The router is a neighbour: a proxy that the environment names is for other hosts.
    client = httpx.Client(limits=limits, trust_env=False)
    atexit.register(client.close)
    return client


def _ask(method: str, path: str, *, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    try:
        response = _send(method, path, body=body, seconds=seconds)
    except httpx.TransportError as error:
        raise IndexNotReady(
            f"The router does not answer: {type(error).__name__}.", retry_after_seconds=RETRY_SECONDS
        ) from error
    if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
        refusal = response.json()
        fault = Fault(refusal["pointer"], refusal["met"], refusal["wanted"], refusal["remedy"])
        raise QueryInvalid(refusal["detail"], faults=[fault])
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise _unavailable(response.json())
    if not response.is_success:
        raise IndexNotReady(f"The router answered {response.status_code}.", retry_after_seconds=RETRY_SECONDS)
    answer: dict[str, Any] = response.json()
    return answer


def _send(method: str, path: str, *, body: dict[str, Any] | None, seconds: float) -> httpx.Response:
    url = settings.HUB_ROUTER_URL.rstrip("/") + path
    headers = {SECRET_HEADER: settings.HUB_ROUTER_SECRET, "Content-Type": "application/json"}
    timeout = httpx.Timeout(seconds, connect=2.0)
    # In ASCII, because half of a surrogate pair, which JSON may carry, has no bytes in UTF-8.
    content = None if body is None else json.dumps(body).encode("ascii")
    try:
        return _client().request(method, url, content=content, headers=headers, timeout=timeout)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        # The connection was kept alive to a router that has gone since; asking twice changes nothing there.
        return _client().request(method, url, content=content, headers=headers, timeout=timeout)


def _unavailable(refusal: dict[str, Any]) -> Unavailable:
    kind = RouterBusy if refusal["code"] == "router-busy" else IndexNotReady
    return kind(refusal["detail"], retry_after_seconds=refusal["retry_after_seconds"])
