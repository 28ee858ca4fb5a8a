"""Ask for the prototypes and neighbours of experts that have none yet."""

from typing import Any

from django.core.management.base import BaseCommand

from registry.services import fingerprints


class Command(BaseCommand):
    help = "Ask for prototypes and neighbours of every head that has none, or has them of an older version."

    def handle(self, *_args: Any, **_options: Any) -> None:
        count = sum(1 for _ in fingerprints.ask_for_missing())
        self.stdout.write(f"{count} revisions will be measured")
