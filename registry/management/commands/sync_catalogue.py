"""Write what the library's catalogues hold, and the well-known base models, into rows."""

from typing import Any

from django.core.management.base import BaseCommand

from registry.services import bases, catalogues


class Command(BaseCommand):
    help = "Write merge methods, codecs, route strategies and well-known base models into the database."

    def handle(self, *args: Any, **options: Any) -> None:
        methods, known = catalogues.sync(), bases.sync()
        self.stdout.write(f"{methods} methods, {known} base models")
