"""What every Hub route shares: the caller, the body, and failures in the words that stock clients read."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast

from django.conf import settings
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from api import authentication, problems
from registry import telemetry
from registry.errors import (
    ExpertNotFound,
    Fault,
    FileNotFound,
    HubError,
    MergeNotFound,
    RequestMalformed,
    RevisionNotFound,
    TooLarge,
)
from registry.models import ApiKey, User

log = logging.getLogger(__name__)
P = ParamSpec("P")
READ = ("GET", "HEAD")

# Hidden and absent things must look alike, so these texts do not depend on what was asked for.
REPOSITORY_NOT_FOUND = "Repository not found, or it is private and this key may not read it."
REVISION_NOT_FOUND = "Revision not found."


@dataclass
class Caller:
    """Who asks, and what their key allows."""

    user: User | AnonymousUser
    key: ApiKey | None = None
    headers: dict[str, str] = field(default_factory=dict)  # for the answer, whatever it is

    @property
    def viewer(self) -> User | AnonymousUser:
        """Whose eyes a read has: a key without scope read sees what everybody sees."""
        if self.key is not None and "read" not in self.key.scopes:
            return AnonymousUser()
        return self.user

    def require(self, scope: str) -> User:
        """The caller as a user whose key has this scope. Raises Unauthenticated, ScopeMissing."""
        return authentication.allow(self.user, self.key, scope)


def endpoint(
    *methods: str,
) -> Callable[
    [Callable[Concatenate[HttpRequest, Caller, P], HttpResponseBase]],
    Callable[Concatenate[HttpRequest, P], HttpResponseBase],
]:
    """A view that gets its caller and whose failures become answers of the Hub protocol."""

    def decorate(
        view: Callable[Concatenate[HttpRequest, Caller, P], HttpResponseBase],
    ) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
        @csrf_exempt
        @wraps(view)
        def door(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
            if request.method not in methods:
                return refusal("This method is not known here.", status=405, headers={"Allow": ", ".join(methods)})
            headers: dict[str, str] = {}
            try:
                caller = caller_of(request)
                headers = caller.headers
                response = view(request, caller, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - one of the two doors that turn any failure into an answer
                response = failure(problems.translate(error))
            for name, value in headers.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Cache-Control", "private, no-store")
            return response

        return cast("Callable[Concatenate[HttpRequest, P], HttpResponseBase]", door)

    return decorate


def caller_of(request: HttpRequest) -> Caller:
    """The user of the Bearer key; on reads also the one who is signed in to the pages.

    These routes take no CSRF token, so a cookie alone may change nothing. Raises Unauthenticated for an invalid key.
    """
    key = authentication.key_of(request.headers.get("Authorization", ""))
    if key is not None:
        return Caller(key.user, key)
    if request.method in READ and settings.SESSION_COOKIE_NAME in request.COOKIES:
        return Caller(request.user)
    return Caller(AnonymousUser())


def failure(error: HubError) -> HttpResponse:
    """A HubError with the headers by which clients tell failures apart."""
    headers = problems.headers(error)
    message = error.detail
    if isinstance(error, ExpertNotFound | MergeNotFound):
        headers["X-Error-Code"], message = "RepoNotFound", REPOSITORY_NOT_FOUND
    elif isinstance(error, RevisionNotFound):
        headers["X-Error-Code"], message = "RevisionNotFound", REVISION_NOT_FOUND
    elif isinstance(error, FileNotFound):
        headers["X-Error-Code"] = "EntryNotFound"
    errors = [fault.as_dict() | {"message": sentence(fault)} for fault in error.faults]
    response = refusal(message, status=error.status, code=error.code, errors=errors, headers=headers)
    return problems.quiet(response, error)


def refusal(
    message: str,
    *,
    status: int,
    code: str = "",
    errors: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> HttpResponse:
    """An error answer; the message is in a header too, since answers to HEAD have no body."""
    request_id = telemetry.request_id.get()
    body = {"error": message, "code": code, "errors": errors or [], "request_id": request_id}
    every = {"X-Error-Message": header_text(message), "X-Request-Id": request_id, **(headers or {})}
    return JsonResponse({name: value for name, value in body.items() if value}, status=status, headers=every)


def sentence(fault: Fault) -> str:
    """A fault as one line, for clients that show text alone."""
    parts = [f"{fault.pointer}: met {fault.met!r}, wanted {fault.wanted!r}."]
    return " ".join([*parts, fault.remedy]).strip()


def header_text(text: str) -> str:
    """Text that may stand in a header: one line of printable ASCII."""
    line = " ".join(text.split())[:500]
    return "".join(sign if " " <= sign <= "~" else "?" for sign in line)


class Body:
    """The raw body of a request as it arrives; one that ends before its announced length is an error, not an end."""

    def __init__(self, request: HttpRequest) -> None:
        is_chunked = request.headers.get("Transfer-Encoding", "").lower() == "chunked"
        # Django reads no further than Content-Length, which a body in chunks does not have.
        self._stream = request.META["wsgi.input"] if is_chunked else request
        self._left = None if is_chunked else int(request.META.get("CONTENT_LENGTH") or 0)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end. Never touch `request.body` beside it."""
        data: bytes = self._stream.read(size)
        if self._left is not None:
            self._left -= len(data)
        if not data and self._left:
            raise RequestMalformed(
                "The body of the request ended early.",
                faults=[Fault("", f"{self._left} bytes less than announced", "the whole body", "Send it again.")],
            )
        return data

    def whole(self, *, limit_bytes: int) -> bytes:
        """All of it. Raises TooLarge."""
        data = b""
        while part := self.read(limit_bytes + 1 - len(data)):
            data += part
            if len(data) > limit_bytes:
                fault = Fault("", f"more than {limit_bytes} bytes", f"at most {limit_bytes} bytes")
                raise TooLarge(f"The body has more than {limit_bytes} bytes.", faults=[fault])
        return data


def json_of(request: HttpRequest) -> dict[str, Any]:
    """The body as one JSON object of bounded size. Raises RequestMalformed, TooLarge."""
    data = Body(request).whole(limit_bytes=settings.HUB_JSON_MAX_BYTES)
    try:
        record = json.loads(data or b"{}", parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestMalformed("The body is not JSON.", faults=[Fault("", "no JSON", "one JSON object")]) from error
    if not isinstance(record, dict):
        fault = Fault("", type(record).__name__, "one JSON object")
        raise RequestMalformed("The body is not a JSON object.", faults=[fault])
    return record


def no_constant(name: str) -> float:
    """Refuse NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(name)


def text_of(record: dict[str, Any], name: str, default: str | None = None) -> str:
    """A text field of a body. Raises RequestMalformed when it is missing or no text."""
    value = record.get(name, default)
    if value is None and default is not None:
        value = default
    # Neither NUL nor half a surrogate pair can be stored, whatever the field.
    if not isinstance(value, str) or "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
        raise RequestMalformed(
            f"The field {name} is no text.",
            faults=[Fault(f"/{name}", ascii(value)[:100], "text without NUL", "Send this field as text.")],
        )
    return value


def is_true(request: HttpRequest, name: str) -> bool:
    """A flag of the query; clients write true, True or 1."""
    return request.GET.get(name, "").lower() in {"true", "1"}


def site(request: HttpRequest) -> str:
    """Scheme and host as the client knows them: it refuses addresses of any other host."""
    return request.build_absolute_uri("/").rstrip("/")
