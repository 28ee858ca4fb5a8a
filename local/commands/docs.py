"""`bin/docs`: write the generated parts of the documentation, or check that they are up to date."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from local import install

DOCS = install.ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bin/docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    wanted = parser.parse_args()
    install.enter("local.commands.docs", sys.argv[1:], need="run")
    # The maths stands only in the environment that was entered by now.
    from local import method_pages  # noqa: PLC0415

    fresh = {"openapi.json": _openapi(), "merge-methods.md": method_pages.overview().encode()}
    fresh |= {f"methods/{name}.md": text.encode() for name, text in method_pages.pages()}
    kept = {str(path.relative_to(DOCS)): path.read_bytes() for path in [*DOCS.glob("methods/*.md")]}
    kept |= {name: (DOCS / name).read_bytes() for name in fresh if (DOCS / name).exists()}
    stale = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    for name in [] if wanted.check else stale:
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        if name in fresh:
            path.write_bytes(fresh[name])
        else:
            path.unlink()
    if stale and wanted.check:
        raise SystemExit(f"docs: {', '.join(stale)} not up to date: run bin/docs")
    print(f"wrote {', '.join(stale)}" if stale else "the generated documentation is up to date")


def _openapi() -> bytes:
    """The schema of the REST doors as the code has it; a warning of the generator is an error."""
    manage = [str(install.PYTHON), str(install.ROOT / "manage.py")]
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "openapi.json"
        options = ["--format", "openapi-json", "--fail-on-warn", "--validate", "--file", str(path)]
        if subprocess.run([*manage, "spectacular", *options], env=environment, check=False).returncode:
            raise SystemExit("the OpenAPI schema could not be made; the reasons stand above")
        return path.read_bytes()


if __name__ == "__main__":
    main()
