"""What every start makes sure of before the hub's processes run: tables, method catalogue, administrator and key.

One process for all of it, because starting Django costs more than the work.
"""

import io
import sys
from pathlib import Path

import django
from django.core.management import call_command

from local import homes
from local.homes import Home


def main() -> None:
    django.setup()
    from django.conf import settings  # noqa: PLC0415 - the settings exist after the line above.

    home = Home(Path(settings.HUB_HOME))
    # The server of static files warns at each of its starts when its folder is absent.
    Path(settings.STATIC_ROOT).mkdir(exist_ok=True)
    call_command("migrate", interactive=False, verbosity=0)
    call_command("sync_catalogue")
    from registry.services import keys  # noqa: PLC0415 - models exist after the set-up.

    known = homes.secrets_of(home)
    if known.api_key and keys.check(known.api_key) is not None:
        return
    _with_input(known.password, "create_user", known.username, "--admin", "--password-stdin", "--exist-ok")
    made = _output("create_key", known.username, "--scopes", "read,write,merge", "--name", "bin/run")
    homes.keep_api_key(home, made)


def _with_input(line: str, *command: str) -> None:
    before, sys.stdin = sys.stdin, io.StringIO(line + "\n")
    try:
        call_command(*command)
    finally:
        sys.stdin = before


def _output(*command: str) -> str:
    out = io.StringIO()
    call_command(*command, stdout=out)
    return out.getvalue().strip()


if __name__ == "__main__":
    main()
