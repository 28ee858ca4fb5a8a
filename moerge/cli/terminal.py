"""Where the command's words go: answers to stdout, everything else to stderr, a progress line only for a person."""

import json
import sys
import time
import unicodedata
from types import TracebackType
from typing import Any, Self

from moerge.cli.problems import Problem

_REDRAW_SECONDS = 0.1
_WIDTH = 24
# Control and direction-changing characters, and the halves of surrogate pairs.
_COMMANDING = frozenset({"Cc", "Cf", "Cs"})


class Terminal:
    """A context manager that takes its progress line away at the end. `watch` is a `moerge.client` Progress."""

    def __init__(self, *, as_json: bool, is_quiet: bool) -> None:
        self.as_json = as_json
        self._is_quiet = is_quiet
        self._draws = not is_quiet and sys.stderr.isatty()
        self._drawn_at = -_REDRAW_SECONDS
        self._length = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wipe()

    def watch(self, what: str, share: float | None) -> None:
        """Show what is going on and how much of it is done (0 to 1), at most ten times a second."""
        now = time.monotonic()
        if not self._draws or (now - self._drawn_at < _REDRAW_SECONDS and share != 1.0):
            return
        self._drawn_at = now
        line = _harmless(what)[:60]
        if share is not None:
            full = round(_WIDTH * min(1.0, max(0.0, share)))
            line = f"{'█' * full}{'░' * (_WIDTH - full)} {share:4.0%} {line}"
        sys.stderr.write(f"\r{line:{self._length}}")
        sys.stderr.flush()
        self._length = len(line)

    def answer(self, record: dict[str, Any], lines: list[str]) -> None:
        """The answer of a command: the record with --json, else the lines."""
        self._wipe()
        print(_dump(record) if self.as_json else "\n".join(map(_harmless, lines)))  # noqa: T201 - the answer

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """A remark to a person."""
        self._wipe()
        if not self._is_quiet:
            print(_harmless(text), file=sys.stderr)  # noqa: T201 - a command speaks

    def refuse(self, problem: Problem) -> None:
        """A problem, always on stderr; with --json also as the one object on stdout."""
        self._wipe()
        print("\n".join(map(_harmless, problem.lines())), file=sys.stderr)  # noqa: T201 - a command speaks
        if self.as_json:
            print(_dump({"problem": problem.record()}))  # noqa: T201 - the answer

    def _wipe(self) -> None:
        if self._length:
            sys.stderr.write(f"\r{'':{self._length}}\r")
            sys.stderr.flush()
            self._length = 0


def _harmless(line: str) -> str:
    """A line without characters that command the terminal: part of what is printed was written by a hub."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(sign) in _COMMANDING else sign for sign in line)


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False)
