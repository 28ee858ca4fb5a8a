"""Errors of the hub, each with a stable code, an HTTP status and a remedy.

HubError
 ├─ NotFound        ExpertNotFound RevisionNotFound FileNotFound MergeNotFound JobNotFound UploadNotFound
 ├─ Unauthenticated no key, or a key that is not known
 ├─ Refused         NotAllowed ScopeMissing QuotaExceeded RateExceeded
 ├─ Invalid         UploadInvalid RecipeInvalid NameInvalid QueryInvalid BaseUnknown RequestInvalid
 ├─ TooLarge        a body, file or upload above its limit
 ├─ Conflict        NameTaken ExpertsIncompatible LicenceBlocked LicenceUnacknowledged NothingToMerge NotReady
 │                  FormFailed MergeFailed MergeNotReproduced TimeExceeded MemoryExceeded OffsetMismatch
 ├─ PackRefused     experts that cannot be in one routing pack: other bases, or nothing to route by
 ├─ MergeSelfCheckFailed  a result does not load as what was computed; nothing was published
 ├─ RangeUnsatisfiable  bytes past the end of a file were asked for
 ├─ ParentStale     the branch moved since the caller last looked
 └─ Unavailable     StorageUnavailable IndexNotReady RouterBusy FormPending MergePending PackPending
                    (jobs retry these, and only these)

The class name in kebab-case is the code; `docs/errors.md` has a heading for each.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from moerge.errors import MoergeError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, what was met, what was wanted, and what to do."""

    pointer: str
    met: Any = None
    wanted: Any = None
    remedy: str = ""
    rule: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")} | {
            "pointer": self.pointer,
            "met": self.met,
            "wanted": self.wanted,
        }


class HubError(Exception):
    """Base of everything a door may have to tell its caller."""

    status = 500
    title = "Internal error"

    def __init__(
        self, detail: str = "", *, faults: Sequence[Fault] = (), retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.faults = tuple(faults)
        self.retry_after_seconds = retry_after_seconds

    @property
    def code(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()

    @classmethod
    def of(cls, error: MoergeError) -> Self:
        """Translate an error of the library, keeping where, what was met and what was wanted."""
        fault = Fault(error.pointer, error.met, error.wanted, error.remedy, error.rule)
        return cls(error.detail, faults=[fault])

    def as_dict(self) -> dict[str, Any]:
        """The record that a failed job keeps and that problem+json is built from."""
        return {
            "code": self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "errors": [fault.as_dict() for fault in self.faults],
        }


class NotFound(HubError):
    status = 404
    title = "Not found"


class ExpertNotFound(NotFound):
    title = "Expert not found"


class RevisionNotFound(NotFound):
    title = "Revision not found"


class FileNotFound(NotFound):
    title = "File not found"


class MergeNotFound(NotFound):
    title = "Merge not found"


class JobNotFound(NotFound):
    title = "Job not found"


class UploadNotFound(NotFound):
    title = "Upload not found"


class Unauthenticated(HubError):
    status = 401
    title = "A valid API key is needed"


class Refused(HubError):
    status = 403
    title = "Not allowed"


class NotAllowed(Refused):
    title = "Not allowed for this account"


class ScopeMissing(Refused):
    title = "The API key lacks a scope"


class EgressRefused(Refused):
    title = "The hub does not speak to that address"


class QuotaExceeded(Refused):
    title = "Quota exceeded"


class RateExceeded(Refused):
    status = 429
    title = "Too many requests"


class Invalid(HubError):
    status = 422
    title = "Well-formed but wrong"


class UploadInvalid(Invalid):
    title = "The upload breaks a rule"


class RecipeInvalid(Invalid):
    title = "The recipe breaks a rule"


class NameInvalid(Invalid):
    title = "The name breaks a rule"


class QueryInvalid(Invalid):
    title = "The query breaks a rule"


class BaseUnknown(Invalid):
    title = "The base model is not known"


class RequestInvalid(Invalid):
    title = "The request breaks a rule"


class RequestMalformed(HubError):
    status = 400
    title = "The request cannot be parsed"


class PackRefused(HubError):
    status = 400
    title = "These experts cannot be in one routing pack"


class TooLarge(HubError):
    status = 413
    title = "Too large"


class Conflict(HubError):
    status = 409
    title = "Conflict with the present state"


class NameTaken(Conflict):
    title = "The name is taken"


class ExpertsIncompatible(Conflict):
    title = "These experts cannot be merged"


class LicenceBlocked(Conflict):
    title = "The licences of these experts do not allow their merge"


class LicenceUnacknowledged(Conflict):
    title = "Somebody must answer for licences that are not known"


class NothingToMerge(Conflict):
    title = "No expert was found that could be merged"


class NotReady(Conflict):
    title = "Not ready yet"


class FormFailed(Conflict):
    title = "The compressed form could not be made"

    def __init__(self, detail: str, *, job_id: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail, faults=faults)
        self.job_id = job_id


class MergeFailed(Conflict):
    title = "The merge could not be computed"

    def __init__(self, detail: str, *, job_id: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail, faults=faults)
        self.job_id = job_id


class MergeNotReproduced(Conflict):
    title = "The merge came out differently than the first time"


class TimeExceeded(Conflict):
    title = "The work took longer than it may"


class MemoryExceeded(Conflict):
    title = "The work needed more memory than it may have"


class MergeSelfCheckFailed(HubError):
    title = "The merge did not come out as it was computed"


class OffsetMismatch(HubError):
    status = 416
    title = "The chunk does not start where the upload stands"

    def __init__(self, detail: str, *, offset: int, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail, faults=faults)
        self.offset = offset


class RangeUnsatisfiable(HubError):
    status = 416
    title = "The file has no such bytes"

    def __init__(self, detail: str, *, size_bytes: int, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail, faults=faults)
        self.size_bytes = size_bytes


class ParentStale(HubError):
    status = 412
    title = "The branch has moved"


class Unavailable(HubError):
    status = 503
    title = "Unavailable for the moment"

    def __init__(self, detail: str = "", *, faults: Sequence[Fault] = (), retry_after_seconds: int | None = 2) -> None:
        super().__init__(detail, faults=faults, retry_after_seconds=retry_after_seconds)


class StorageUnavailable(Unavailable):
    title = "The storage does not answer"


class EgressFailed(HubError):
    status = 502
    title = "Another server did not answer as it should"


class IndexNotReady(Unavailable):
    title = "The routing index is not ready"


class RouterBusy(Unavailable):
    title = "The router has too much to encode"


class FormPending(Unavailable):
    title = "The compressed form is being made"

    def __init__(self, detail: str, *, job_id: str) -> None:
        super().__init__(detail, retry_after_seconds=2)
        self.job_id = job_id


class MergePending(Unavailable):
    title = "The merge is being computed"

    def __init__(self, detail: str, *, job_id: str) -> None:
        super().__init__(detail, retry_after_seconds=2)
        self.job_id = job_id


class PackPending(Unavailable):
    title = "The prototypes of an expert are being computed"

    def __init__(self, detail: str, *, job_id: str) -> None:
        super().__init__(detail, retry_after_seconds=2)
        self.job_id = job_id
