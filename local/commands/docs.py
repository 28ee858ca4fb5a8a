"""`bin/docs`: write the generated parts of the documentation, or check that they are up to date."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from local import install

OPENAPI = install.ROOT / "docs" / "openapi.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bin/docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    wanted = parser.parse_args()
    install.enter("local.commands.docs", sys.argv[1:], need="run")
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / OPENAPI.name
        _write_openapi(fresh)
        if fresh.read_bytes() == (OPENAPI.read_bytes() if OPENAPI.exists() else b""):
            print(f"{OPENAPI.relative_to(install.ROOT)} is up to date")
        elif wanted.check:
            raise SystemExit(f"{OPENAPI.relative_to(install.ROOT)} is not up to date: run bin/docs")
        else:
            OPENAPI.write_bytes(fresh.read_bytes())
            print(f"wrote {OPENAPI.relative_to(install.ROOT)}")


def _write_openapi(path: Path) -> None:
    """The schema of the REST doors as the code has it; a warning of the generator is an error."""
    manage = [str(install.PYTHON), str(install.ROOT / "manage.py")]
    options = ["--format", "openapi-json", "--fail-on-warn", "--validate", "--file", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT)}
    if subprocess.run([*manage, "spectacular", *options], env=environment, check=False).returncode:
        raise SystemExit("the OpenAPI schema could not be made; the reasons stand above")


if __name__ == "__main__":
    main()
