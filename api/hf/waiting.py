"""Requests that wait a moment for a reconstruction, so that clients need not come again after a second."""

import threading
import time
from dataclasses import dataclass

from django.conf import settings

from registry.models import Job, Revision
from registry.services import reconstructions
from registry.services.reconstructions import Reconstruction

# A request that waits holds one of the few threads of its process; all others are told to come again.
MOST_HELD = 2
LOOK_EVERY_SECONDS = 0.2
_places = threading.BoundedSemaphore(MOST_HELD)


@dataclass(frozen=True)
class Pending:
    """A reconstruction whose weights a job makes."""

    found: Reconstruction
    job: Job

    def wait(self) -> Revision:
        """The revision as soon as it is there. Raises FormPending after a moment, FormFailed, RevisionNotFound."""
        job = self.job
        if job.state not in Job.FINISHED and _places.acquire(blocking=False):
            try:
                job = self._watched(until=time.monotonic() + settings.HUB_HOLD_SECONDS)
            finally:
                _places.release()
        revision = reconstructions.made_of(self.found.source, self.found.form)
        if revision is None:
            raise reconstructions.outcome(job)
        return revision

    def _watched(self, *, until: float) -> Job:
        """The job when it has ended or the time is over."""
        while True:
            job = Job.objects.get(pk=self.job.pk)
            if job.state in Job.FINISHED or time.monotonic() >= until:
                return job
            time.sleep(LOOK_EVERY_SECONDS)
