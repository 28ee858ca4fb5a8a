"""Make a user and the namespace of the same name."""

import getpass
import secrets
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from registry.errors import HubError, NameTaken
from registry.models import User
from registry.services import accounts


class Command(BaseCommand):
    help = "Make a user. The password is asked for, or made and printed when there is no terminal."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--admin", action="store_true", help="may administer the hub")
        parser.add_argument("--email", default="")
        parser.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
        parser.add_argument("--exist-ok", action="store_true", help="a user of this name gets the password instead")

    def handle(self, *args: Any, **options: Any) -> None:
        password, is_made = self._password(from_stdin=options["password_stdin"])
        try:
            accounts.create_user(
                name=options["name"], password=password, email=options["email"], is_admin=options["admin"]
            )
        except NameTaken as error:
            known = User.objects.filter(username=options["name"]).first() if options["exist_ok"] else None
            if known is None:
                raise CommandError(error.detail) from error
            known.set_password(password)
            known.save(update_fields=["password"])
        except HubError as error:
            raise CommandError(f"{error.detail} {'; '.join(str(fault.wanted) for fault in error.faults)}") from error
        self.stdout.write(f"{options['name']} {password}" if is_made else options["name"])

    def _password(self, *, from_stdin: bool) -> tuple[str, bool]:
        if from_stdin:
            return sys.stdin.readline().rstrip("\r\n"), False
        if sys.stdin.isatty():
            return getpass.getpass("Password: "), False
        return secrets.token_urlsafe(16), True
