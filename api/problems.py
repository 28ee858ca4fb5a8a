"""Errors as problem+json (RFC 9457): the only place that turns a HubError into an HTTP answer."""

import logging
from typing import Any, TypeVar

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpResponseBase, JsonResponse
from django.http.request import RawPostDataException, UnreadablePostError
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.settings import api_settings

from moerge.errors import MoergeError
from registry import telemetry
from registry.errors import (
    Fault,
    FormFailed,
    FormPending,
    HubError,
    Invalid,
    MergeFailed,
    MergePending,
    NotAllowed,
    NotFound,
    PackPending,
    RangeUnsatisfiable,
    RateExceeded,
    RequestInvalid,
    RequestMalformed,
    StorageUnavailable,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", bound=HttpResponseBase)
CONTENT_TYPE = "application/problem+json"


def record(error: HubError) -> dict[str, Any]:
    """The body of the answer."""
    body = {
        "type": f"/docs/errors#{error.code}",
        **error.as_dict(),
        "request_id": telemetry.request_id.get(),
    }
    if isinstance(error, FormPending | FormFailed | MergePending | MergeFailed | PackPending):
        body |= {"job": error.job_id, "job_url": f"/api/v1/jobs/{error.job_id}"}
    return body


def headers(error: HubError) -> dict[str, str]:
    found = {}
    if error.retry_after_seconds is not None:
        found["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthenticated):
        found["WWW-Authenticate"] = 'Bearer realm="moerge"'
    if (offset := getattr(error, "offset", None)) is not None:
        found["Upload-Offset"] = str(offset)
    if isinstance(error, RangeUnsatisfiable):
        found["Content-Range"] = f"bytes */{error.size_bytes}"
    return found


def answer(error: HubError) -> JsonResponse:
    """For plain Django views."""
    body = record(error)
    if (offset := getattr(error, "offset", None)) is not None:
        body["offset"] = offset
    return quiet(JsonResponse(body, status=error.status, content_type=CONTENT_TYPE, headers=headers(error)), error)


def quiet(response: Answer, error: HubError) -> Answer:
    """The answer, without a line in the log for each time somebody looks whether a form or a merge is there."""
    if isinstance(error, FormPending | MergePending | PackPending):
        response._has_been_logged = True  # type: ignore[attr-defined]  # noqa: SLF001 - Django logs every other 503
    return response


def handle(error: Exception, _context: dict[str, Any]) -> Response | JsonResponse | None:
    """DRF's exception handler. A bug becomes a 500 without detail; the log has the rest under the request id."""
    return answer(translate(error))


def translate(error: Exception) -> HubError:
    """Any failure as one of ours."""
    if isinstance(error, HubError):
        return error
    if isinstance(error, MoergeError):
        return Invalid.of(error)
    if isinstance(error, Http404 | exceptions.NotFound):
        return NotFound("There is nothing at this address.")
    if isinstance(error, exceptions.APIException):
        return of_framework(error)
    if isinstance(error, RequestDataTooBig | RawPostDataException | UnreadablePostError):
        return _of_body(error)
    if isinstance(error, OperationalError | InterfaceError):
        log.warning("The database did not answer a request.", extra={"error.detail": str(error)})
        return Unavailable("The database does not answer.", retry_after_seconds=2)
    if isinstance(error, OSError):
        log.error("The disk or a socket failed during a request.", exc_info=error)
        return StorageUnavailable(f"The storage does not answer: {error.strerror or 'an error of the disk'}.")
    log.error("A request broke.", exc_info=error)
    return HubError("An error of the hub; the log has it under this request id.")


def _of_body(error: Exception) -> HubError:
    """What Django says of a body that it could not read."""
    if not isinstance(error, RequestDataTooBig):
        return RequestMalformed("The body of the request ended early.")
    limit = f"at most {settings.HUB_JSON_MAX_BYTES} bytes"
    fault = Fault("", "more", limit, "Send less, or files by an upload.")
    return TooLarge(f"The body may have {limit}.", faults=[fault])


def of_framework(error: exceptions.APIException) -> HubError:
    """DRF's own errors, translated once, here."""
    if isinstance(error, exceptions.ValidationError):
        return RequestInvalid("The request breaks a rule.", faults=list(faults(error.detail)))
    if isinstance(error, exceptions.ParseError):
        return RequestMalformed(f"The body is not valid JSON: {error.detail}")
    if isinstance(error, exceptions.NotAuthenticated | exceptions.AuthenticationFailed):
        return Unauthenticated(str(error.detail))
    if isinstance(error, exceptions.PermissionDenied):
        return NotAllowed(str(error.detail))
    if isinstance(error, exceptions.Throttled):
        wait = int(getattr(error, "wait", None) or 1) + 1
        return RateExceeded(f"Too many requests; try again in {wait} seconds.", retry_after_seconds=wait)
    other = HubError(str(error.detail))
    other.status = error.status_code
    other.title = str(error.default_detail)
    return other


def faults(detail: Any, pointer: str = "") -> "list[Fault]":
    """DRF's nested messages as a flat list with JSON pointers."""
    if isinstance(detail, dict):
        # What the framework says of an object as a whole is no field of it.
        places = {key: pointer if key == api_settings.NON_FIELD_ERRORS_KEY else f"{pointer}/{key}" for key in detail}
        return [fault for key, inner in detail.items() for fault in faults(inner, places[key])]
    if isinstance(detail, list):
        inner = [part for part in detail if isinstance(part, dict | list)]
        if inner:
            return [fault for place, part in enumerate(detail) for fault in faults(part, f"{pointer}/{place}")]
        return [Fault(pointer, None, str(message), "Correct this field.") for message in detail]
    return [Fault(pointer, None, str(detail), "Correct this field.")]
