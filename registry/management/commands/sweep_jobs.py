"""Send again the jobs whose message or worker was lost."""

from typing import Any

from django.core.management.base import BaseCommand

from registry import jobs


class Command(BaseCommand):
    help = "Send queued jobs that nobody took, and jobs whose worker died, once more."

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"{jobs.sweep()} jobs sent")
