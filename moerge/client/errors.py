"""Errors between this machine and a hub.

ClientError
 ├─ AddressInvalid   a reference, an endpoint or a key is not of the form it must have
 ├─ HubUnreachable   no answer came
 │   └─ BrokenOff    an answer ended before its time
 ├─ WaitedTooLong    the hub was not ready within the caller's time
 ├─ AnswerInvalid    an answer is not what the API promises
 ├─ JobFailed        work of the hub that the caller waited for failed
 ├─ PathUnsafe       a file name from the hub would leave the folder
 ├─ FolderBusy       another pull writes to the same folder
 ├─ DownloadDamaged  what arrived does not have the size or the SHA-256 that the hub told
 └─ HubRefused       problem+json, with `status`, `code` and `request_id`
     └─ Unauthenticated NotAllowed NotFound Conflict TooLarge Invalid RateExceeded Unavailable
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moerge.errors import MoergeError


class ClientError(MoergeError):
    """Something went wrong between this machine and a hub."""


class AddressInvalid(ClientError):
    """A reference is not owner/name[@revision], or an endpoint or a key cannot be one."""


class HubUnreachable(ClientError):
    """The hub gave no answer: wrong address, not running, or the network is down."""


class BrokenOff(HubUnreachable):
    """The connection was lost in the middle of an answer; asking for the rest may help."""


class WaitedTooLong(ClientError):
    """The hub said "not yet" until the caller's time was over."""


class AnswerInvalid(ClientError):
    """An answer is not what the API promises: probably something else than a hub answers at the endpoint."""


class JobFailed(ClientError):
    """The hub could not do the work that the request needs."""


class PathUnsafe(ClientError):
    """The hub names a file whose path is not plain and relative; nothing is written."""


class FolderBusy(ClientError):
    """Another process is pulling into the same folder."""


class DownloadDamaged(ClientError):
    """Size or SHA-256 of what arrived differ from what the hub told; the damaged file is removed."""


class HubRefused(ClientError):
    """The hub refused a request and says why.

    `faults` are the problem's `errors`; `job_id` names the work that makes what is missing, where there is some.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        title: str = "",
        request_id: str = "",
        faults: Sequence[Mapping[str, Any]] = (),
        job_id: str = "",
    ) -> None:
        first = faults[0] if faults else {}
        super().__init__(
            detail,
            pointer=str(first.get("pointer") or ""),
            met=first.get("met"),
            wanted=first.get("wanted"),
            remedy=str(first.get("remedy") or ""),
            rule=str(first.get("rule") or ""),
        )
        self.status = status
        self.code = code
        self.title = title
        self.request_id = request_id
        self.faults = tuple(faults)
        self.job_id = job_id


class Unauthenticated(HubRefused):
    """401: no key, or one that is not known."""


class NotAllowed(HubRefused):
    """403: known, but not allowed."""


class NotFound(HubRefused):
    """404: absent, or hidden from this key."""


class Conflict(HubRefused):
    """409: in conflict with the present state."""


class TooLarge(HubRefused):
    """413: above a limit of the hub."""


class Invalid(HubRefused):
    """422: well-formed but wrong."""


class RateExceeded(HubRefused):
    """429: too many requests."""


class Unavailable(HubRefused):
    """503: not for the moment."""


BY_STATUS: Mapping[int, type[HubRefused]] = {
    401: Unauthenticated,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Invalid,
    429: RateExceeded,
    503: Unavailable,
}
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def of_problem(status: int, body: Any) -> HubRefused:
    """A problem+json document as an exception; what is missing or of a wrong type in it is left out."""
    fields = body if isinstance(body, dict) else {}
    faults = fields.get("errors")
    job_id = fields.get("job")
    return BY_STATUS.get(status, HubRefused)(
        # The Hub protocol has a sentence under `error` instead.
        _text(fields, "detail") or _text(fields, "error") or f"The hub answered {status} without a reason.",
        status=status,
        code=_text(fields, "code") or f"http-{status}",
        title=_text(fields, "title"),
        request_id=_text(fields, "request_id"),
        faults=[fault for fault in faults if isinstance(fault, dict)] if isinstance(faults, list) else [],
        job_id=job_id if isinstance(job_id, str) and _JOB_ID.fullmatch(job_id) else "",
    )


def code_of(error: MoergeError) -> str:
    """The stable code of an error: the hub's own, or the name of the class in kebab-case."""
    if isinstance(error, HubRefused):
        return error.code
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""
