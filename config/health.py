"""What operators and supervisors ask: is the process alive, is the hub ready, what are the figures."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import current_app
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from kombu.exceptions import OperationalError as BrokerError

from registry import selectors, telemetry
from registry.errors import Unavailable
from registry.services import routing


@dataclass
class Remembered:
    """A costly probe, asked at most every few seconds by however many callers."""

    probe: Callable[[], dict[str, Any]]
    seconds: float
    at: float = -1e9
    answer: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self) -> dict[str, Any]:
        with self.lock:
            if time.monotonic() - self.at > self.seconds:
                self.answer = self.probe()
                self.at = time.monotonic()
            return self.answer


def alive(_request: HttpRequest) -> HttpResponse:
    return JsonResponse({"alive": True})


def ready(_request: HttpRequest) -> HttpResponse:
    parts = {
        "web": {"state": "ready"},
        "database": database(),
        "broker": broker(),
        "router": router(),
        "workers": workers(),
    }
    is_ready = all(part["state"] == "ready" for part in parts.values())
    response = JsonResponse({"ready": is_ready, "parts": parts}, status=200 if is_ready else 503)
    if not is_ready:
        response["Retry-After"] = "2"
        # Django would log every 503 as an error; here it is the ordinary answer of a start.
        response._has_been_logged = True  # type: ignore[attr-defined]  # noqa: SLF001 - no public switch
    return response


def metrics(_request: HttpRequest) -> HttpResponse:
    lines = telemetry.lines()
    lines += [telemetry.line(name, value, labels) for name, labels, value in selectors.figures()]
    return HttpResponse("\n".join(lines) + "\n", content_type="text/plain; version=0.0.4; charset=utf-8")


def database() -> dict[str, Any]:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError as error:
        return {"state": "down", "reason": str(error).splitlines()[0]}
    return {"state": "ready"}


def broker() -> dict[str, Any]:
    try:
        with current_app.connection_for_write() as link:
            link.ensure_connection(max_retries=0, timeout=2)
    except (BrokerError, OSError) as error:
        return {"state": "down", "reason": f"The queue does not answer: {error}"}
    return {"state": "ready"}


def router() -> dict[str, Any]:
    try:
        health = routing.router_health()
    except Unavailable as error:
        return {"state": "down", "reason": error.detail}
    if health.get("encoder") != "ready":
        return {"state": "starting", "reason": "The encoder is loading; routing answers by BM25 alone.", **health}
    return {"state": "ready", **health}


def _ping_workers() -> dict[str, Any]:
    wanted = {"light", "heavy"}
    try:
        # The first two answers are enough as a rule; with several workers of one kind they may come from the same kind.
        names = _answering(limit=len(wanted))
        if wanted - _kinds(names):
            names = _answering(limit=None)
    except (BrokerError, OSError) as error:
        return {"state": "down", "reason": f"The queue does not answer: {error}"}
    missing = sorted(wanted - _kinds(names))
    if missing:
        return {"state": "down", "reason": f"No worker answers for: {', '.join(missing)}.", "answering": sorted(names)}
    return {"state": "ready", "answering": sorted(names)}


def _answering(*, limit: int | None) -> set[str]:
    answers = current_app.control.ping(timeout=1.5, limit=limit) or []
    return {name for answer in answers for name in answer}


def _kinds(names: set[str]) -> set[str]:
    """The queues that workers of these names serve: light@host, heavy-2@host."""
    return {name.partition("@")[0].rstrip("-0123456789") for name in names}


workers = Remembered(_ping_workers, seconds=2.0)
