"""Make an API key and print it, and nothing else."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from registry.errors import HubError
from registry.models import User
from registry.services import keys


class Command(BaseCommand):
    help = "Make an API key for a user and print it."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("user")
        parser.add_argument("--scopes", default="read", help="read, write, merge, admin, separated by commas")
        parser.add_argument("--name", default="command line")

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"]).first()
        if user is None:
            raise CommandError(f"There is no user {options['user']!r}.")
        scopes = [scope.strip() for scope in options["scopes"].split(",") if scope.strip()]
        try:
            _, secret = keys.create(user=user, name=options["name"], scopes=scopes)
        except HubError as error:
            raise CommandError(f"{error.detail} {'; '.join(str(fault.wanted) for fault in error.faults)}") from error
        self.stdout.write(secret)
