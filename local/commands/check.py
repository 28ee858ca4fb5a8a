"""`bin/check`: style, types, import walls, migrations and generated files, in the order of their speed."""

import argparse
import os
import subprocess
import sys

from local import install

TOOLS = str(install.PYTHON.parent)

CHECKS: dict[str, list[str]] = {
    "style": [f"{TOOLS}/ruff", "check", "."],
    "format": [f"{TOOLS}/ruff", "format", "--check", "."],
    "imports": [f"{TOOLS}/lint-imports"],
    "types": [f"{TOOLS}/mypy"],
    # No database is asked here, and Django warns of that.
    "migrations": [
        str(install.PYTHON),
        "-W",
        "ignore::RuntimeWarning",
        "manage.py",
        "makemigrations",
        "--check",
        "--dry-run",
    ],
    "docs": [str(install.PYTHON), "-P", "-m", "local.commands.docs", "--check"],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bin/check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CHECK", help=f"only these of: {', '.join(CHECKS)}")
    wanted = parser.parse_args()
    if unknown := [name for name in wanted.names if name not in CHECKS]:
        parser.error(f"no check is called {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    install.enter("local.commands.check", sys.argv[1:], need="develop")
    # No server is asked: a wrong address here would only make the checks wait for one.
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT), "DJANGO_SETTINGS_MODULE": "config.settings"}
    failed = []
    for name in wanted.names or CHECKS:
        print(f"== {name}", flush=True)
        if subprocess.run(CHECKS[name], cwd=install.ROOT, env=environment, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
