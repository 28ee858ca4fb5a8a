"""One request: its id, its log line, and the headers every answer carries."""

import logging
import re
import time
import uuid
from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from config import handlers
from registry import telemetry
from registry.errors import Fault, RequestMalformed

log = logging.getLogger("hub.request")
ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class RequestContext:
    """Give each request an id that logs, problems and the answer share."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        offered = request.headers.get("X-Request-Id", "")
        identity = offered if ACCEPTABLE_ID.fullmatch(offered) else uuid.uuid4().hex
        token = telemetry.request_id.set(identity)
        started = time.monotonic()
        try:
            response = self.get_response(request)
            duration_ms = round((time.monotonic() - started) * 1000, 1)
            response.headers.setdefault("X-Request-Id", identity)
            response.headers.setdefault("Content-Security-Policy", POLICY)
            telemetry.count("hub_requests_total", method=request.method or "", status=str(response.status_code))
            telemetry.count("hub_request_duration_ms_total", duration_ms)
            if not request.path.startswith(("/static/", "/healthz", "/readyz", "/metrics")):
                log.info(
                    "%s %s %s",
                    request.method,
                    request.path,
                    response.status_code,
                    extra={
                        "http.method": request.method,
                        "http.path": request.path,
                        "http.status": response.status_code,
                        "http.duration_ms": duration_ms,
                    },
                )
            return response
        finally:
            telemetry.request_id.reset(token)


class NoNul:
    """Refuse addresses with a NUL character at once: no name holds one, and PostgreSQL cannot even look for it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        # The Hub protocol has words of its own for names that cannot be.
        is_hub_protocol = request.path.startswith("/api/") and not request.path.startswith("/api/v1/")
        if not is_hub_protocol and ("\0" in request.path or "%00" in request.META.get("QUERY_STRING", "")):
            fault = Fault("url", "%00", "an address without NUL characters", "Take it out.")
            return handlers.answer(request, RequestMalformed("The address holds a NUL character.", faults=[fault]))
        return self.get_response(request)
