"""Make the weights of a base model known to the hub, or forget them."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from registry.errors import HubError
from registry.services import base_weights, bases


class Command(BaseCommand):
    help = "Hash a checkpoint folder of HUB_BASES_DIR and take it as the weights of a base model."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="a base that the hub knows, by any of its names")
        parser.add_argument("folder", nargs="?", help="a checkpoint folder in HUB_BASES_DIR")
        parser.add_argument("--remove", action="store_true", help="forget the weights; files stay where they are")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["remove"] == bool(options["folder"]):
            raise CommandError("Name a folder, or --remove.")
        try:
            base = bases.resolve(options["name"], pointer="/name")
            if options["remove"]:
                base_weights.remove(user=None, base=base)
                self.stdout.write(f"{base.name}: no weights")
                return
            base_weights.add(user=None, base=base, folder=options["folder"], progress=self._tell)
        except HubError as error:
            raise CommandError(f"{error.detail} {' '.join(fault.remedy for fault in error.faults)}") from error
        self.stdout.write(f"{base.name} {base.weights['digest']}")

    def _tell(self, share: float) -> None:
        if self.stderr.isatty():
            self.stderr.write(f"\r{share:4.0%} of this file", ending="" if share < 1 else "\n")
