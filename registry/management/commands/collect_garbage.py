"""Remove what nothing refers to."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from registry.services import cleaning


class Command(BaseCommand):
    help = "Remove blobs that nothing refers to, uploads past their time and forgotten staging files."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--grace-seconds",
            type=int,
            default=None,
            help="spare blobs touched within this time (default: the setting)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        removed = {
            "uploads": cleaning.close_stale_uploads(),
            "blobs": cleaning.collect_garbage(grace_seconds=options["grace_seconds"]),
            "staging files": cleaning.clear_staging(),
        }
        self.stdout.write(", ".join(f"{count} {what}" for what, count in removed.items()) + " removed")
