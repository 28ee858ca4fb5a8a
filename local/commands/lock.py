"""`bin/lock`: compile requirements.txt and requirements-dev.txt from their .in files.

torch is pinned without its CUDA closure: which build a machine gets is decided at its installation (local/install.py).
"""

import argparse
import subprocess
import sys

from local import install

# Packages that torch's plain release asks for on Linux with a GPU; pip brings them along with that release.
CUDA = ("nvidia-", "cuda-", "triton")
PAIRS = {"requirements.in": "requirements.txt", "requirements-dev.in": "requirements-dev.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bin/lock", description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases that the .in files allow")
    wanted = parser.parse_args()
    install.enter("local.commands.lock", sys.argv[1:], need="run")
    for source, target in PAIRS.items():
        _compile(source, target, upgrade=wanted.upgrade)


def _compile(source: str, target: str, *, upgrade: bool) -> None:
    uv = install.PYTHON.parent / "uv"
    options = ["--universal", "--python-version", "3.11", "--no-header", "--no-annotate", "--quiet"]
    upgrading = ["--upgrade"] if upgrade else []
    path = install.ROOT / target
    # uv keeps the pins of the file it writes to, unless it is told to upgrade.
    done = subprocess.run(
        [str(uv), "pip", "compile", *options, *upgrading, "--output-file", target, source],
        cwd=install.ROOT,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{source} could not be compiled; {target} may be unchanged")
    kept = [line for line in path.read_text().splitlines() if not line.startswith(CUDA)]
    path.write_text("\n".join(kept) + "\n")
    print(f"{target}: {len(kept)} pins")


if __name__ == "__main__":
    main()
