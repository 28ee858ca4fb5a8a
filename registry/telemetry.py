"""Log context, JSON lines and counters. Fields are dotted by noun; never keys, mails or bodies."""

import json
import logging
import threading
from collections import defaultdict
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="")
job_id: ContextVar[str] = ContextVar("job_id", default="")

STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


class ContextFilter(logging.Filter):
    """Add the request or job that a line belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        if value := request_id.get():
            record.__dict__["request.id"] = value
        if value := job_id.get():
            record.__dict__["job.id"] = value
        return True


class JSONFormatter(logging.Formatter):
    """One JSON object a line: readable message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in STANDARD and "." in key}
        if record.exc_info:
            line["error.stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


_lock = threading.Lock()
_counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)


def count(name: str, amount: float = 1, **labels: str) -> None:
    """Raise a counter of this process: hub_<noun>_<verb>_<unit>; labels from bounded sets only."""
    with _lock:
        _counters[name, tuple(sorted(labels.items()))] += amount


def lines() -> list[str]:
    """This process's counters in Prometheus text form."""
    with _lock:
        rows = sorted(_counters.items())
    return [line(name, value, dict(labels)) for (name, labels), value in rows]


def line(name: str, value: float, labels: dict[str, str] | None = None) -> str:
    """One sample in Prometheus text form."""
    inside = ",".join(f"{key}={json.dumps(text)}" for key, text in (labels or {}).items())
    return f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"
