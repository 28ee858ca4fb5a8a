"""One process that starts the parts of a hub in order, restarts those that die, and stops all in order.

It runs in one thread: the kernel ends the children of a thread that dies, and forking is safe only without others.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local import homes, processes
from local.homes import Home
from local.processes import Command, LocalError

FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 8.0
# A part that ran this long had started well; its next death is a new story.
SETTLED_SECONDS = 20.0
LOG_MAX_BYTES = 20 * 2**20


class Stopped(Exception):
    """The supervisor was asked to stop while it waited for something."""


@dataclass
class Part:
    """One process that is to run: how it is started (asked anew at every start) and how it is stopped.

    A server is stopped after all that are none.
    """

    name: str
    command: Callable[[], Command]
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 15.0
    before: Callable[[], None] | None = None
    is_server: bool = False
    child: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    due: float = 0.0


@dataclass
class Supervisor:
    """The parts in the order of their start, and what is told about them in run.json."""

    home: Home
    facts: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    state: str = "starting"
    waiting_for: str | None = None
    stopping: bool = False
    _wake: tuple[socket.socket, socket.socket] | None = None

    def listen(self) -> None:
        """Take signals: the usual ones ask for a stop, and the death of a child ends a wait at once."""
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, *_: object) -> None:
        self.stopping = True

    def add(self, part: Part) -> None:
        """Start a part and keep it running from now on."""
        self.parts.append(part)
        self._start(part)
        self.tell()

    def until(
        self, condition: Callable[[], bool], *, waiting_for: str, seconds: float | None = None, every: float = 0.05
    ) -> None:
        """Supervise until the condition holds; Stopped when asked to stop, LocalError after so many seconds."""
        self.waiting_for = waiting_for
        self.tell()
        deadline = None if seconds is None else time.monotonic() + seconds
        while not condition():
            self.turn(every)
            if self.stopping:
                raise Stopped
            if deadline is not None and time.monotonic() > deadline:
                raise LocalError(f"{waiting_for} was not ready after {seconds:.0f} s; see {self.home.log(waiting_for)}")
        self.waiting_for = None

    def turn(self, seconds: float) -> None:
        """Restart what died and is due, then wait for at most so long, less when a child dies or a signal comes."""
        changed = [self._look_after(part) for part in self.parts]
        if any(changed):
            self.tell()
        assert self._wake is not None
        due = [part.due - time.monotonic() for part in self.parts if part.child is None]
        select.select([self._wake[0]], [], [], max(min([seconds, *due]), 0))
        try:
            while self._wake[0].recv(512):
                pass
        except BlockingIOError:
            return

    def run_once(self, name: str, command: Command, *, seconds: float) -> int:
        """Run a command to its end while the parts are looked after; its exit status. LocalError after so long."""
        with self._log(name).open("ab") as output:
            child = processes.start(command, output=output)
        try:
            self.until(lambda: child.poll() is not None, waiting_for=name, seconds=seconds)
        finally:
            processes.end(child.pid, seconds=5 if child.poll() is None else 0)
            child.wait()
        return child.returncode

    def stop(self) -> None:
        """Stop the parts, those that use servers before the servers; each gets its time, then SIGKILL."""
        self.state = "stopping"
        self.stopping = True
        self._stop_all([part for part in reversed(self.parts) if not part.is_server])
        self._stop_all([part for part in reversed(self.parts) if part.is_server])
        self.tell()

    def _stop_all(self, parts: Iterable[Part]) -> None:
        """Ask all of them at once, so that a stop takes as long as the slowest and not as long as all together."""
        since = time.monotonic()
        running = [(part, part.child) for part in parts if part.child is not None]
        for part, child in running:
            if child.poll() is None:
                child.send_signal(part.stop_signal)
        for part, child in running:
            left = since + part.stop_seconds - time.monotonic()
            if not _is_over(child, seconds=max(left, 0)):
                say(f"{part.name} did not stop within {part.stop_seconds:.0f} s and is killed")
            processes.kill_group(child.pid)
            child.wait()
            part.child = None
            say(f"stopped {part.name} after {time.monotonic() - since:.1f} s")

    def tell(self) -> None:
        """Write run.json, and beside it what is needed to find the same processes after a crash."""
        running = {part.name: part.child.pid for part in self.parts if part.child is not None}
        record = {**self.facts, "processes": running, "supervisor": os.getpid()}
        homes.write_private(self.home.run_file, {**record, "state": self.state, "waiting_for": self.waiting_for})
        children = {name: {"pid": pid, "born": processes.born(pid)} for name, pid in running.items()}
        homes.write_private(self.home.children_file, children)

    def _look_after(self, part: Part) -> bool:
        """Whether the part died or was started in this turn."""
        if part.child is not None:
            status = part.child.poll()
            if status is None:
                return False
            # Whatever the dead one had started would hold its files and its work.
            processes.kill_group(part.child.pid)
            part.child = None
            lived = time.monotonic() - part.started
            part.failures = 0 if lived > SETTLED_SECONDS else part.failures + 1
            delay = min(FIRST_DELAY_SECONDS * 2 ** max(part.failures - 1, 0), LONGEST_DELAY_SECONDS)
            part.due = time.monotonic() + delay
            say(f"{part.name} ended with {status}; it starts again in {delay:.2f} s, see {self.home.log(part.name)}")
            return True
        if time.monotonic() < part.due:
            return False
        try:
            self._start(part)
        except (OSError, LocalError, subprocess.SubprocessError) as error:
            part.failures += 1
            part.due = time.monotonic() + LONGEST_DELAY_SECONDS
            say(f"{part.name} cannot be started: {error}")
        return True

    def _start(self, part: Part) -> None:
        if part.before is not None:
            part.before()
        with self._log(part.name).open("ab") as output:
            part.child = processes.start(part.command(), output=output)
        part.started = time.monotonic()

    def _log(self, name: str) -> Path:
        path = self.home.log(name)
        if path.exists() and path.stat().st_size > LOG_MAX_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path


def _is_over(child: subprocess.Popen[bytes], *, seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def recover(home: Home, *, seconds: float = 10) -> None:
    """End the processes that an earlier supervisor of this home left, known by number and time of birth."""
    for name, child in homes.read(home.children_file).items():
        born = processes.born(child["pid"])
        if born is not None and born == child["born"]:
            say(f"ending {name} (process {child['pid']}), left by a supervisor that was killed")
            first = signal.SIGINT if name == "postgres" else signal.SIGTERM
            processes.end(child["pid"], first=first, seconds=seconds)
        elif born is None:
            # Its leader is gone, but the number stays taken as long as one process of the group lives.
            processes.kill_group(child["pid"])
    home.children_file.unlink(missing_ok=True)


def ask(url: str, *, seconds: float = 2.0) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer; (0, {}) when nobody answers."""
    # A proxy of the environment is for the network, not for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            return answer.status, _json(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, _json(error.read())
    except (OSError, ValueError):
        return 0, {}


def _json(body: bytes) -> dict[str, Any]:
    try:
        record = json.loads(body)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def unready(answer: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The parts of a /readyz answer that are not ready, each with its reason."""
    for name, part in answer.get("parts", {}).items():
        if part.get("state") != "ready":
            yield name, str(part.get("reason", part.get("state")))


def say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(f"{stamp} {text}\n")
    sys.stderr.flush()
