"""`bin/test`: pytest over real parts, with PostgreSQL and Redis of its own in a temporary folder."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from local import install

DESCRIPTION = """Runs the tests. All arguments but --help go to pytest; besides pytest's own these are understood:

  --suite clients|fuzz|chaos|browser   run this suite; a plain run leaves clients, fuzz and chaos out
  --no-skips                           any skipped test fails, unless it needs a GPU
  --golden-dir DIR                     golden cases of DIR: bin/test tests/golden --golden-dir DIR
  --golden-allow-unbuilt               merge methods that are not built are skipped there

Whoever names no path gets all tests, in three processes: one has the tests of the whole hub, the others begin with the
rest (-n 0 for one process).
The run starts its own PostgreSQL and Redis; DATABASE_URL and BROKER_URL name others.
CHROMIUM_PATH names the browser. It can run beside a running hub."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bin/test",
        usage="bin/test [PYTEST ARGS] [--suite NAME] [--no-skips]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_known_args([argument for argument in sys.argv[1:] if argument in {"-h", "--help"}])
    install.enter("local.commands.test", sys.argv[1:], need="develop")
    arguments = [*_processes(sys.argv[1:]), *(_from_root(argument) for argument in sys.argv[1:])]
    os.chdir(install.ROOT)
    # pytest itself says 4 to wrong usage, and the scripts of this project say 2 to it.
    import pytest  # noqa: PLC0415 - it stands only in the environment that was entered just above.

    sys.path.insert(0, str(install.ROOT))
    status = pytest.main(arguments)
    sys.stdout.flush()
    sys.exit(2 if status == pytest.ExitCode.USAGE_ERROR else int(status))


def _processes(arguments: Sequence[str]) -> list[str]:
    """pytest-xdist's options for a run of everything; a part of the tests is sooner done in one process."""
    is_part = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
    is_chosen = any(argument.startswith(("--suite", "--collect-only", "-n", "--pdb")) for argument in arguments)
    return [] if is_part or is_chosen else ["-n", "3", "--dist", "loadgroup"]


def _from_root(argument: str) -> str:
    """A path given from the caller's folder, so that it still names the same after going to the root."""
    path, colons, name = argument.partition("::")
    if argument.startswith("-") or not Path(path).exists():
        return argument
    return f"{Path(path).resolve()}{colons}{name}"


if __name__ == "__main__":
    main()
