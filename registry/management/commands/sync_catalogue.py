"""Write what the library's catalogues hold, the well-known base models and the packaged encoder into rows."""

from typing import Any

from django.core.management.base import BaseCommand

from registry.services import bases, catalogues, encoders


class Command(BaseCommand):
    help = "Write methods, codecs, strategies, well-known base models and the packaged encoder into the database."

    def handle(self, *args: Any, **options: Any) -> None:
        methods, known = catalogues.sync(), bases.sync()
        encoders.register()
        self.stdout.write(f"{methods} methods, {known} base models")
