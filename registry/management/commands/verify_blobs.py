"""Read every blob back and compare it with its name."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from registry.services import blobs


class Command(BaseCommand):
    help = "Re-hash every blob. Lists damaged, missing and unknown ones and exits 1 when there are any."

    def handle(self, *args: Any, **options: Any) -> None:
        count, damage = 0, 0
        for sha256, problem in blobs.verify():
            count += 1
            if problem:
                damage += 1
                self.stdout.write(f"{sha256} {problem}")
        if damage:
            raise CommandError(f"{damage} of {count} blobs are not as they should be.")
        self.stdout.write(f"{count} blobs are sound")
