"""`bin/manage`: manage.py with the settings of a home.

A hub that runs is used as it is. Where none runs, the home's PostgreSQL (and Redis, where there is one) are started for
the length of the command.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from local import install

if TYPE_CHECKING:
    from local.homes import Home

USAGE = """usage: bin/manage COMMAND [ARGS] [--home DIR]

Runs a command of manage.py with the settings of a home (default: HUB_HOME or ./var), such as
  bin/manage create_user NAME [--admin]
  bin/manage create_key USER --scopes read,write,merge
  bin/manage verify_blobs
  bin/manage help                lists all commands
  bin/manage COMMAND --help      tells about one
"""
WRONG_USAGE = 2


def main() -> None:
    arguments, folder = take_home(sys.argv[1:])
    if not arguments or arguments[0] in {"-h", "--help"}:
        (sys.stdout if arguments else sys.stderr).write(USAGE)
        sys.exit(0 if arguments else WRONG_USAGE)
    install.enter("local.commands.manage", sys.argv[1:], need="run")
    from local import homes  # noqa: PLC0415 - these need the installed packages.
    from local.processes import LocalError  # noqa: PLC0415

    try:
        home = homes.make(folder or homes.default_folder())
        with _environment(home) as environment:
            sys.exit(_run(arguments, environment))
    except LocalError as error:
        sys.stderr.write(f"bin/manage: {error}\n")
        sys.exit(1)


def take_home(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without --home, and what it said. It may stand before or after the command."""
    rest: list[str] = []
    folder: Path | None = None
    left = iter(arguments)
    for argument in left:
        if argument == "--home":
            value = next(left, None)
            if value is None:
                sys.stderr.write(f"{USAGE}bin/manage: error: --home wants a folder\n")
                sys.exit(WRONG_USAGE)
            folder = Path(value)
        elif argument.startswith("--home="):
            folder = Path(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest, folder


@contextlib.contextmanager
def _environment(home: "Home") -> Iterator[dict[str, str]]:
    """The environment of the home's processes, with servers that answer for as long as it is open."""
    from local import homes, postgres, redis  # noqa: PLC0415

    known = homes.secrets_of(home)
    running = homes.read(home.run_file) if homes.holder(home) is not None else {}
    if doors := running.get("doors"):
        yield homes.environment(home, **doors)
        return
    with contextlib.ExitStack() as servers:
        database_url = homes.given_database_url() or servers.enter_context(
            postgres.running(home.folder / "postgres", password=known.postgres_password, log=home.log("postgres"))
        )
        broker_url = homes.given_broker_url() or servers.enter_context(
            redis.running(home.folder / "redis", password=known.redis_password, log=home.log("redis"))
        )
        yield homes.environment(home, database_url=database_url, broker_url=broker_url, router_url="")


def _run(arguments: list[str], environment: dict[str, str]) -> int:
    """The command's own exit status; 2 for one that does not exist."""
    manage = [str(install.PYTHON), str(install.ROOT / "manage.py")]
    status = subprocess.run([*manage, *arguments], env=environment, check=False).returncode
    # Django says 1 to a command that it does not know, as to one that failed.
    return WRONG_USAGE if status == 1 and not _exists(arguments[0], manage, environment) else status


def _exists(name: str, manage: list[str], environment: dict[str, str]) -> bool:
    listing = [*manage, "help", "--commands"]
    known = subprocess.run(listing, env=environment, capture_output=True, text=True, check=False)
    return known.returncode != 0 or name in {*known.stdout.split(), "help", "version", "--version"}


if __name__ == "__main__":
    main()
