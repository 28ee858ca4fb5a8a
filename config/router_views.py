"""The doors of the router process, which only web and workers use: JSON in, JSON out, behind a shared secret."""

import base64
import hmac
import json
import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from django.conf import settings

from moerge.errors import QueryInvalid
from registry.errors import IndexNotReady, RouterBusy
from registry.services.router import Router
from registry.services.router_link import SECRET_HEADER

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

# 32 texts of 20,000 characters, each of up to 12 bytes in JSON, and a list of allowed experts.
MAX_BODY_BYTES = 32 * 2**20
_SECRET_KEY = "HTTP_" + SECRET_HEADER.upper().replace("-", "_")

Answer = tuple[HTTPStatus, dict[str, Any]]


class Application:
    """A WSGI application around one Router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._doors: dict[tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]] = {
            ("POST", "/route"): self._route,
            ("POST", "/encode"): self._encode,
            ("POST", "/preview"): self._preview,
        }

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        status, body = self._answer(environ)
        data = json.dumps(body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("Retry-After", str(body["retry_after_seconds"])))
        start_response(f"{status.value} {status.phrase}", headers)
        return [data]

    def _answer(self, environ: "WSGIEnvironment") -> Answer:
        # Health tells nothing about experts or queries, and a supervisor asks it without knowing the secret.
        if (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("GET", "/health"):
            return HTTPStatus.OK, self._router.health()
        if not hmac.compare_digest(environ.get(_SECRET_KEY, "").encode(), settings.HUB_ROUTER_SECRET.encode()):
            return HTTPStatus.FORBIDDEN, {"detail": "The shared secret is missing or wrong."}
        door = self._doors.get((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if door is None:
            return HTTPStatus.NOT_FOUND, {"detail": "There is nothing at this address."}
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length > MAX_BODY_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"detail": f"{length} bytes, wanted at most {MAX_BODY_BYTES}."}
        try:
            return HTTPStatus.OK, door(json.loads(environ["wsgi.input"].read(length)))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            log.warning("A request to the router is malformed.", exc_info=error)
            return HTTPStatus.BAD_REQUEST, {"detail": "The body is not a request of this door."}
        except QueryInvalid as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {
                "detail": error.detail,
                "pointer": error.pointer,
                "met": error.met,
                "wanted": error.wanted,
                "remedy": error.remedy,
            }
        except (IndexNotReady, RouterBusy) as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, {
                "code": error.code,
                "detail": error.detail,
                "retry_after_seconds": error.retry_after_seconds or 1,
            }

    def _route(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._router.route(**body)

    def _preview(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._router.preview(**body)

    def _encode(self, body: dict[str, Any]) -> dict[str, Any]:
        vectors = self._router.encode(body["texts"], encoder_id=body["encoder"])
        return {"vectors": base64.b64encode(vectors.astype("<f4").tobytes()).decode("ascii")}
