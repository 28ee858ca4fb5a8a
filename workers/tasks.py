"""What Celery can be asked for: every job kind by name, and the two clocks (sweep, clean).

The message is only a hint that a row is ready; everything else is in the row (registry.jobs).
"""

from celery import shared_task
from django.db import close_old_connections

from registry import jobs
from registry.services import cleaning
from workers import runner

for _kind in jobs.JobKind:
    shared_task(name=f"workers.{_kind}")(runner.run)


@shared_task(name="workers.sweep")
def sweep() -> None:
    """Send again the jobs whose message or worker was lost."""
    close_old_connections()
    jobs.sweep()


@shared_task(name="workers.clean")
def clean() -> None:
    """Remove what nothing refers to any more and what was never finished."""
    close_old_connections()
    cleaning.clean()
