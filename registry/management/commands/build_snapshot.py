"""Write the routing index as files now, without waiting for the night or for more changes."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from registry.errors import IndexNotReady
from registry.services import encoders, snapshots


class Command(BaseCommand):
    help = "Build a snapshot of the routing index by the active encoder. A damaged one of the same state is replaced."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            row = snapshots.build(encoders.active())
        except IndexNotReady as error:
            raise CommandError(error.detail) from error
        facts = f"{row.counts['experts']} experts, {row.counts['vectors']} vectors, {row.counts['bytes']} bytes"
        self.stdout.write(f"{row.folder}: {facts}")
