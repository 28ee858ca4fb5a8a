"""What Celery can be asked for: every job kind by name, and the three clocks (sweep, clean, snapshots).

The message is only a hint that a row is ready; everything else is in the row (registry.jobs).
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from celery import shared_task
from django.db import close_old_connections

from registry import jobs
from registry.services import cleaning, snapshots
from workers import runner

P = ParamSpec("P")


def fresh(function: Callable[P, object]) -> Callable[P, None]:
    """Drop database connections that died or grew old, before and after, as Django does around a request."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        close_old_connections()
        try:
            function(*args, **kwargs)
        finally:
            close_old_connections()

    return wrapped


for _kind in jobs.JobKind:
    shared_task(name=f"workers.{_kind}")(fresh(runner.run))
# Send again the jobs whose message or worker was lost.
shared_task(name="workers.sweep")(fresh(jobs.sweep))
# Remove what nothing refers to any more and what was never finished.
shared_task(name="workers.clean")(fresh(cleaning.clean))
# Have the routing index written as files when too much of it is not.
shared_task(name="workers.snapshots")(fresh(snapshots.ask))
