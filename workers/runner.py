"""Carry one job from claim to end: keep its lease alive, tell progress, hold its limits, write what came of it."""

import importlib
import logging
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection

from moerge import errors as library
from moerge.errors import MoergeError
from registry import jobs, telemetry
from registry.errors import (
    ExpertsIncompatible,
    Fault,
    HubError,
    Invalid,
    MemoryExceeded,
    RecipeInvalid,
    TimeExceeded,
    Unavailable,
)
from registry.jobs import JobKind
from registry.models import Job

log = logging.getLogger(__name__)
TOLD_EVERY_SECONDS = 0.5
# How often a cancel is looked for while a job says nothing.
LOOK_EVERY_SECONDS = 0.5
# What the library refuses is no error of the hub.
_KINDS: Mapping[type[MoergeError], type[HubError]] = {
    library.ExpertsIncompatible: ExpertsIncompatible,
    library.RecipeInvalid: RecipeInvalid,
}
# A job that was told to stop and does not is closed over its head after this time.
STOP_SECONDS = 30
# What a merge may take beyond its plan: libraries that are loaded in it, their threads, the files it stages.
MEMORY_SLACK_BYTES = 2**30
REMEDY = "Merge fewer experts, ask for a smaller rank, or have the operator raise the limit."


class NotApplicable(Exception):
    """The subject has nothing for this kind of job to do; the message says why."""


class Stopped(Exception):
    """The lease was lost or a cancel was asked for."""


@dataclass
class Work:
    """What a job function gets: its lease and a way to tell progress."""

    lease: jobs.Lease
    limit_seconds: float = math.inf
    stopped: threading.Event = field(default_factory=threading.Event)
    started_at: float = field(default_factory=time.monotonic)
    # What was last written of it, and when: a job may tell more often than anybody looks.
    _told: str | None = None
    _told_at: float = -math.inf

    def progress(self, share: float, message: str | None = None) -> None:
        """Tell how far the job is (0..1); it is written twice a second at most, a new message at once.

        Raises Stopped when the job is to end.
        """
        now = time.monotonic()
        is_new = message is not None and message != self._told
        if not self.is_stopped() and not is_new and now - self._told_at < TOLD_EVERY_SECONDS:
            return
        if self.is_stopped() or not jobs.heartbeat(self.lease, progress=share, message=message):
            raise Stopped
        self._told, self._told_at = message or self._told, now

    def is_stopped(self) -> bool:
        """Whether the job is to end: it was cancelled, its lease is lost, or its time is over."""
        return self.stopped.is_set() or self.is_overdue

    @property
    def is_overdue(self) -> bool:
        return self.over_seconds > 0

    @property
    def over_seconds(self) -> float:
        """How long the job has been running beyond its time."""
        return time.monotonic() - self.started_at - self.limit_seconds

    def time_exceeded(self) -> TimeExceeded:
        fault = Fault("/job", "not ready in time", f"at most {self.limit_seconds:g} s", REMEDY, "L2")
        return TimeExceeded(f"The job was stopped after {self.limit_seconds:g} seconds.", faults=[fault])


def run(job_id: str) -> None:
    """Claim one job and carry it to its end; a job that is not to be had is somebody else's."""
    lease = jobs.claim(job_id)
    if lease is None:
        return
    token = telemetry.job_id.set(job_id)
    is_merge = lease.kind == JobKind.MERGE
    work = Work(lease, limit_seconds=settings.HUB_MERGE_MAX_SECONDS if is_merge else math.inf)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(work, over), daemon=True, name=f"lease-{job_id[:8]}")
    beat.start()
    try:
        _carry_out(work)
    except (OperationalError, InterfaceError):
        # The database went away: nothing can be written now. The lease runs out and the sweeper sends the job again.
        log.warning("A job lost the database; it will be tried again.", extra={"job.kind": lease.kind})
    finally:
        over.set()
        beat.join()
        telemetry.job_id.reset(token)


def _carry_out(work: Work) -> None:
    lease = work.lease
    function: Callable[[Work], dict[str, Any] | None] = importlib.import_module(f"workers.jobs.{lease.kind}").run
    try:
        if lease.kind == JobKind.MERGE:
            with memory_limit(settings.HUB_MERGE_MEMORY_BYTES):
                result = function(work)
        else:
            result = function(work)
        jobs.finish(lease, result=result)
    except NotApplicable as reason:
        jobs.finish(lease, state=Job.State.NOT_APPLICABLE, message=str(reason))
    except Stopped:
        if work.is_overdue:
            jobs.fail(lease, work.time_exceeded().as_dict())
        else:
            jobs.finish(lease, state=Job.State.CANCELLED, message="Cancelled.")
    except Unavailable as error:
        jobs.postpone(lease, seconds=error.retry_after_seconds or 2, reason=error.detail)
    except HubError as error:
        jobs.fail(lease, error.as_dict())
    except MoergeError as error:
        kind = _KINDS.get(type(error), Invalid)
        jobs.fail(lease, kind.of(error).as_dict())
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        log.exception("A job broke.", extra={"job.kind": lease.kind})
        jobs.fail(lease, HubError("An error of the hub, not of the upload; the log has it under this job.").as_dict())


@contextmanager
def memory_limit(memory_bytes: int) -> Iterator[None]:
    """Let this process take this much memory beyond what it has, and no more, where the kernel can be told so.

    Raises MemoryExceeded in place of what numpy and torch raise when they get none.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    present = _data_bytes()
    if present is not None:
        wanted = present + memory_bytes + MEMORY_SLACK_BYTES
        soft = wanted if before[1] == resource.RLIM_INFINITY else min(wanted, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no error of its own for the memory of the processor.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        fault = Fault("/job", "more", f"at most {memory_bytes} bytes", REMEDY, "L2")
        raise MemoryExceeded("The job needed more memory than it may have.", faults=[fault]) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int | None:
    """What counts for RLIMIT_DATA now; None where the kernel does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    rows = [line.split() for line in status.read_text().splitlines() if line.startswith("VmData:")]
    return int(rows[0][1]) * 1024 if rows else None


def _beat(work: Work, over: threading.Event) -> None:
    """Extend the lease until the job is over; tell the job when it is to stop, and close it when it does not."""
    told_at = time.monotonic()
    try:
        while not over.wait(LOOK_EVERY_SECONDS):
            try:
                if work.over_seconds > STOP_SECONDS:
                    jobs.fail(work.lease, work.time_exceeded().as_dict())
                if time.monotonic() - told_at < settings.HUB_JOB_HEARTBEAT_SECONDS:
                    is_wanted = jobs.is_wanted(work.lease)
                else:
                    told_at, is_wanted = time.monotonic(), jobs.heartbeat(work.lease)
            except (OperationalError, InterfaceError):
                connection.close()  # the next look opens a new one
                continue
            if not is_wanted:
                work.stopped.set()
                return
    finally:
        connection.close()
