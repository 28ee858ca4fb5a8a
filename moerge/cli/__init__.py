"""The `moerge` command. Exit status: 0 ok, 1 refused, 2 wrong usage, 3 verification failed."""

from moerge.cli.command import main

__all__ = ["main"]
