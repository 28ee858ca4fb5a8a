"""`bin/bench`: the measurements of the folder benchmarks/, in the environment of the checkout."""

import os
import sys

from local import install


def main() -> None:
    install.enter("local.commands.bench", sys.argv[1:], need="run")
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT)}
    os.execve(  # noqa: S606 - one program takes the place of another, on purpose.
        install.PYTHON, [str(install.PYTHON), "-P", "-m", "benchmarks", *sys.argv[1:]], environment
    )


if __name__ == "__main__":
    main()
