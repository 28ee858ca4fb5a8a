"""Failures as problems: what went wrong, what was met and wanted, what to do, and the exit status."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moerge.client import errors as client
from moerge.errors import (
    AdapterInvalid,
    CheckpointInvalid,
    ConfigInvalid,
    EncodedInvalid,
    HeaderInvalid,
    MoergeError,
    ParameterInvalid,
)

REFUSED, USAGE, DAMAGED = 1, 2, 3
_USAGE = (client.AddressInvalid, ParameterInvalid)
_DAMAGED = (client.DownloadDamaged, EncodedInvalid)
# What is wrong with a file is a refusal to the commands that use the file, and the answer of the one that verifies it.
_DAMAGED_IN_VERIFY = (HeaderInvalid, ConfigInvalid, AdapterInvalid, CheckpointInvalid)


@dataclass(frozen=True)
class Problem:
    """In the words of problem+json (RFC 9457); `status` is the exit status."""

    status: int
    code: str
    detail: str
    faults: tuple[Mapping[str, Any], ...] = ()
    request_id: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        found = {"exit_status": self.status, "code": self.code, "detail": self.detail, "errors": [*self.faults]}
        if self.request_id:
            found["request_id"] = self.request_id
        return found | dict(self.more)

    def lines(self) -> list[str]:
        """For a person: the detail, then what to do."""
        rules = sorted({f"rule {fault['rule']}" for fault in self.faults if fault.get("rule")})
        told = [f"moerge: {', '.join([self.code, *rules])}: {self.detail}"]
        for fault in self.faults:
            pointer = str(fault.get("pointer") or "")
            # A JSON pointer says where in the caller's own file; other names stand in the detail.
            where = f"{pointer}: " if pointer and (len(self.faults) > 1 or pointer.startswith("/")) else ""
            is_told = len(self.faults) > 1 or (where and not fault.get("remedy"))
            if is_told and (fault.get("met") is not None or fault.get("wanted") is not None):
                told.append(f"  {where}met {fault.get('met')}, wanted {fault.get('wanted')}")
            if fault.get("remedy"):
                told.append(f"  {where}{fault['remedy']}")
        if self.request_id:
            told.append(f"  The hub knows this request as {self.request_id}.")
        return told


def of(error: MoergeError | OSError | MemoryError, *, command: str) -> Problem:
    """Any failure that a command may end with."""
    if isinstance(error, client.HubRefused):
        return Problem(REFUSED, error.code, error.detail, error.faults, error.request_id, {"status": error.status})
    if isinstance(error, MoergeError):
        return Problem(_status(error, command), client.code_of(error), error.detail, (_fault(error),))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Problem(REFUSED, "file-error", f"{where}{error.strerror or error}.")
    remedy = {"pointer": "", "met": None, "wanted": None, "remedy": "Free some memory, or use a larger machine."}
    return Problem(REFUSED, "out-of-memory", "There is not enough memory.", (remedy,))


def _status(error: MoergeError, command: str) -> int:
    if isinstance(error, _USAGE):
        return USAGE
    if isinstance(error, _DAMAGED) or (command == "verify" and isinstance(error, _DAMAGED_IN_VERIFY)):
        return DAMAGED
    return REFUSED


def _fault(error: MoergeError) -> dict[str, Any]:
    fault = {"pointer": error.pointer, "met": _plain(error.met), "wanted": _plain(error.wanted)}
    return fault | {key: text for key, text in (("remedy", error.remedy), ("rule", error.rule)) if text}


def _plain(value: object) -> object:
    """What JSON can hold: numbers and texts as they are, the rest in words."""
    return value if value is None or isinstance(value, bool | int | str) else str(value)
