"""Make the vectors and the change log of routing anew from what is stored."""

from typing import Any

from django.core.management.base import BaseCommand

from registry.services import routing


class Command(BaseCommand):
    help = "Embed what lacks vectors by the present encoder and publish every routable expert again (needs the router)."

    def handle(self, *args: Any, **options: Any) -> None:
        count = sum(1 for _ in routing.rebuild())
        self.stdout.write(f"{count} experts published")
