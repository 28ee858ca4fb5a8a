"""Requests that wait a moment for what a job makes, so that clients need not come again after a second."""

import threading
import time
from collections.abc import Callable

from django.conf import settings

from registry.errors import HubError
from registry.models import Job, Revision

# A request that waits holds one of the few threads of its process; all others are told to come again.
MOST_HELD = 2
LOOK_EVERY_SECONDS = 0.2
_places = threading.BoundedSemaphore(MOST_HELD)


def wait(job: Job, *, made: Callable[[], Revision | None], outcome: Callable[[Job], HubError]) -> Revision:
    """What a job makes, as soon as it is there.

    Raises `outcome` of the job when it is not there after a moment, or at once when enough others wait already.
    """
    if job.state not in Job.FINISHED and _places.acquire(blocking=False):
        try:
            job = _watched(job, until=time.monotonic() + settings.HUB_HOLD_SECONDS)
        finally:
            _places.release()
    revision = made() if job.state in Job.FINISHED else None
    if revision is None:
        raise outcome(job)
    return revision


def _watched(job: Job, *, until: float) -> Job:
    """The job when it has ended or the time is over."""
    while True:
        found = Job.objects.get(pk=job.pk)
        if found.state in Job.FINISHED or time.monotonic() >= until:
            return found
        time.sleep(LOOK_EVERY_SECONDS)
