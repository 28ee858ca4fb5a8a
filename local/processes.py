"""Start, watch and end operating-system processes.

A child gets a session of its own (so that all it starts can be ended together) and, on Linux, dies with the thread that
started it: the kernel sends it a signal when its parent is gone, SIGKILL included.
"""

import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import IO

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class LocalError(Exception):
    """A part of the local set-up cannot do its work; the message is for the person at the terminal."""


@dataclass(frozen=True)
class User:
    """Whom a child runs as. `sees_all` keeps the right to pass folders that are closed to this user."""

    name: str
    uid: int
    gid: int
    sees_all: bool = False


@dataclass(frozen=True)
class Command:
    """What to start: arguments, environment, folder and user; `death_signal` is sent when the parent dies."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    user: User | None = None
    death_signal: signal.Signals = signal.SIGTERM
    inherit: Sequence[int] = field(default=())


def nobody() -> User:
    record = pwd.getpwnam("nobody")
    return User(name="nobody", uid=record.pw_uid, gid=record.pw_gid)


def start(command: Command, *, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, both outputs to `output`.

    Call it from the main thread: the kernel ties the death signal to the thread that forked.
    """
    return subprocess.Popen(
        list(command.argv),
        env=dict(command.environment),
        cwd=command.folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(command.inherit),
        # The user is changed here too, because rights can only be kept across the change by the code that makes it.
        preexec_fn=_before_exec(command.user, command.death_signal, os.getpid()),  # noqa: PLW1509
    )


def run(command: Command, *, seconds: float = 120) -> str:
    """Run the command to its end and give back what it said; LocalError when it fails."""
    child = start(command, output=subprocess.PIPE)
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(child.pid, seconds=0)
        child.wait()
        raise LocalError(f"{Path(command.argv[0]).name} was not done after {seconds:.0f} s") from None
    text = said.decode(errors="replace")
    if child.returncode:
        raise LocalError(f"{Path(command.argv[0]).name} ended with {child.returncode}:\n{text.strip()[-2000:]}")
    return text


def _before_exec(user: User | None, death_signal: signal.Signals, parent: int) -> Callable[[], None]:
    def prepare() -> None:
        if user is not None:
            _become(user)
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
            # The parent may have died between fork and prctl; nobody would send the signal then.
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _become(user: User) -> None:
    """Change group and user for good; with `sees_all` keep the one capability that passes closed folders."""
    if user.sees_all and _LIBC is not None:
        _LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        # Else the kernel answers access(2), by which PostgreSQL looks at its programs, as if there were no right.
        _LIBC.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.setgroups([])
    os.setgid(user.gid)
    os.setuid(user.uid)
    if user.sees_all and _LIBC is not None:
        _keep_capability(CAP_DAC_READ_SEARCH) or _keep_capability(CAP_DAC_OVERRIDE)


def _keep_capability(number: int) -> bool:
    """Make one capability permitted, inheritable and ambient, and drop all others; False when it may not be kept."""
    assert _LIBC is not None
    mask = 1 << number
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    if _LIBC.capset(ctypes.byref(header), ctypes.byref(data)):
        return False
    return bool(_LIBC.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0) == 0)


def end(pid: int, *, first: signal.Signals = signal.SIGTERM, seconds: float = 10) -> None:
    """End a process that `start` started and everything of its session: politely, then with SIGKILL."""
    if seconds > 0 and _signal(pid, first):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and alive(pid):
            time.sleep(0.05)
    kill_group(pid)


def kill_group(pid: int) -> None:
    """SIGKILL to all processes of the group that the process leads; none left is fine."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def born(pid: int) -> float | None:
    """When the process started (epoch seconds): with the pid it names one process for ever. None when it is gone."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def reachable(folder: Path, *, user: User) -> bool:
    """Whether the user may pass every folder down to this one."""
    return all(_may_pass(part, user) for part in _upwards(folder.resolve()))


def _upwards(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents


def _may_pass(folder: Path, user: User) -> bool:
    found = folder.stat()
    if found.st_uid == user.uid:
        return bool(found.st_mode & 0o100)
    if found.st_gid == user.gid:
        return bool(found.st_mode & 0o010)
    return bool(found.st_mode & 0o001)


def free_port() -> int:
    """A free port of 127.0.0.1 below the range the kernel gives to outgoing connections.

    A server that is restarted on its port must not find it taken by somebody's outgoing connection.
    """
    random = SystemRandom()
    for _ in range(200):
        port = random.randrange(15_000, 32_000)
        if is_free(port):
            return port
    raise LocalError("no free port found between 15000 and 32000 on 127.0.0.1")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
