"""Carry one job from claim to end: keep its lease alive, tell progress, write what came of it."""

import importlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection

from moerge.errors import MoergeError
from registry import jobs, telemetry
from registry.errors import HubError, Unavailable
from registry.models import Job

log = logging.getLogger(__name__)
TOLD_EVERY_SECONDS = 0.5


class NotApplicable(Exception):
    """The subject has nothing for this kind of job to do; the message says why."""


class Stopped(Exception):
    """The lease was lost or a cancel was asked for."""


@dataclass
class Work:
    """What a job function gets: its lease and a way to tell progress."""

    lease: jobs.Lease
    stopped: threading.Event = field(default_factory=threading.Event)
    # What was last written of it, and when: a job may tell more often than anybody looks.
    _told: str | None = None
    _told_at: float = -math.inf

    def progress(self, share: float, message: str | None = None) -> None:
        """Tell how far the job is (0..1); it is written twice a second at most, a new message at once.

        Raises Stopped when the job is to end.
        """
        now = time.monotonic()
        is_new = message is not None and message != self._told
        if not self.stopped.is_set() and not is_new and now - self._told_at < TOLD_EVERY_SECONDS:
            return
        if self.stopped.is_set() or not jobs.heartbeat(self.lease, progress=share, message=message):
            raise Stopped
        self._told, self._told_at = message or self._told, now

    def is_stopped(self) -> bool:
        return self.stopped.is_set()


def run(job_id: str) -> None:
    """Claim one job and carry it to its end; a job that is not to be had is somebody else's."""
    lease = jobs.claim(job_id)
    if lease is None:
        return
    token = telemetry.job_id.set(job_id)
    work = Work(lease)
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
        jobs.finish(lease, result=function(work))
    except NotApplicable as reason:
        jobs.finish(lease, state=Job.State.NOT_APPLICABLE, message=str(reason))
    except Stopped:
        jobs.finish(lease, state=Job.State.CANCELLED, message="Cancelled.")
    except Unavailable as error:
        jobs.postpone(lease, seconds=error.retry_after_seconds or 2, reason=error.detail)
    except HubError as error:
        jobs.fail(lease, error.as_dict())
    except MoergeError as error:
        jobs.fail(lease, HubError.of(error).as_dict())
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        log.exception("A job broke.", extra={"job.kind": lease.kind})
        jobs.fail(lease, HubError("An error of the hub, not of the upload; the log has it under this job.").as_dict())


def _beat(work: Work, over: threading.Event) -> None:
    """Extend the lease until the job is over; tell the job when the lease is gone."""
    try:
        while not over.wait(settings.HUB_JOB_HEARTBEAT_SECONDS):
            try:
                if not jobs.heartbeat(work.lease):
                    work.stopped.set()
                    return
            except (OperationalError, InterfaceError):
                connection.close()  # the next beat opens a new one
    finally:
        connection.close()
