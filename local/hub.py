"""The parts of a hub on one machine, in the order in which they need each other.

Servers first (PostgreSQL, Redis, unless others were named), then the rows that every start makes sure of, then web,
router, workers and beat; the demo experts are uploaded as soon as the web answers.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from local import homes, postgres, processes, redis, supervisor
from local.homes import Home
from local.install import PYTHON, ROOT
from local.processes import Command, LocalError
from local.supervisor import Part, Stopped, Supervisor

PREPARE_ATTEMPTS = 3

# Which log tells why a part of /readyz is not ready.
LOGS = {
    "web": ("web",),
    "database": ("postgres",),
    "broker": ("redis",),
    "router": ("router",),
    "workers": ("worker-light", "worker-heavy"),
}


@dataclass(frozen=True)
class Options:
    home: Path
    port: int
    demo: bool
    routers: int
    workers: int
    timeout_seconds: float


@dataclass(frozen=True)
class Doors:
    """The listening sockets of web and router.

    The supervisor holds them, so that the port is certain from the start, several processes can share one, and clients
    wait in the queue of the socket instead of being refused while a killed process starts again.
    """

    web: socket.socket
    router: socket.socket


def serve(options: Options) -> int:
    """Run a hub until it is asked to stop; the exit status. Only the main thread of a process may call it."""
    home = homes.make(options.home)
    homes.take(home)
    # Whatever the hub's processes write (blobs of private experts, logs) is for its owner alone.
    os.umask(0o077)
    home.run_file.unlink(missing_ok=True)
    supervisor.recover(home)
    doors = _open_doors(options.port)
    known = homes.secrets_of(home)
    url = f"http://127.0.0.1:{doors.web.getsockname()[1]}"
    facts: dict[str, Any] = {"url": url, "home": str(home.folder)}
    facts |= {"username": known.username, "password": known.password, "api_key": known.api_key}
    watch = Supervisor(home=home, facts=facts)
    watch.listen()
    error: LocalError | None = None
    try:
        _start(watch, doors, options)
        _announce(watch)
        while not watch.stopping:
            watch.turn(5.0)
    except Stopped:
        pass
    except LocalError as met:
        error = met
        watch.facts["error"] = str(met)
    finally:
        watch.stop()
        if error is None:
            home.run_file.unlink(missing_ok=True)
        home.children_file.unlink(missing_ok=True)
    if error is not None:
        raise error
    return 0


def _open_doors(port: int) -> Doors:
    try:
        web = socket.create_server(("127.0.0.1", port), backlog=512)
    except OSError as error:
        raise LocalError(
            f"port {port} of 127.0.0.1 cannot be had: {error.strerror}; name another with --port"
        ) from error
    return Doors(web=web, router=socket.create_server(("127.0.0.1", 0), backlog=512))


def _start(watch: Supervisor, doors: Doors, options: Options) -> None:
    """Start all parts; returns when the hub is ready. LocalError names the part that is not, and its log."""
    since = time.monotonic()
    deadline = since + options.timeout_seconds
    database_url, broker_url = _start_servers(watch, deadline)
    router_url = f"http://127.0.0.1:{doors.router.getsockname()[1]}"
    watch.facts["doors"] = {"database_url": database_url, "broker_url": broker_url, "router_url": router_url}
    environment = homes.environment(watch.home, **watch.facts["doors"])
    _prepare(watch, environment, deadline)
    url = watch.facts["url"]
    for part in served_parts(environment, doors, options):
        watch.add(part)
    _wait(watch, "web", lambda: supervisor.ask(f"{url}/healthz")[0] == 200, deadline=deadline)
    watch.facts["seconds"] = {"first_page": round(time.monotonic() - since, 1)}
    # The first page comes sooner when the workers' imports do not compete with it for the processor.
    for part in worker_parts(watch.home, environment, options):
        watch.add(part)
    seed = _start_seed(watch, environment) if options.demo else None
    last: dict[str, Any] = {}

    def is_ready() -> bool:
        status, answer = supervisor.ask(f"{url}/readyz", seconds=5)
        last.clear()
        last.update(answer)
        watch.waiting_for = ", ".join(name for name, _ in supervisor.unready(answer)) or "web"
        return status == 200 and (seed is None or seed.is_over())

    try:
        _wait(watch, "readyz", is_ready, deadline=deadline, every=0.5)
    except LocalError:
        raise LocalError(_missing(watch.home, last, options)) from None
    finally:
        if seed is not None:
            seed.end()
    watch.facts["seconds"]["ready"] = round(time.monotonic() - since, 1)
    watch.state, watch.waiting_for = "ready", None
    watch.tell()


def _wait(watch: Supervisor, part: str, condition: Callable[[], bool], *, deadline: float, every: float = 0.1) -> None:
    left = max(deadline - time.monotonic(), 0)
    watch.until(condition, waiting_for=part, seconds=left, every=every)


def _start_servers(watch: Supervisor, deadline: float) -> tuple[str, str]:
    """Start PostgreSQL and Redis unless the environment names others; the URLs of both."""
    known = homes.secrets_of(watch.home)
    database_url, broker_url = homes.given_database_url(), homes.given_broker_url()
    own = []
    if not broker_url:
        broker = redis.prepare(watch.home.folder / "redis", password=known.redis_password)
        port = processes.free_port()
        broker_url = redis.url(broker, port=port)
        watch.add(Part("redis", partial(redis.serve, broker, port=port), is_server=True))
        own.append(("redis", partial(redis.accepts, broker_url)))
    if not database_url:
        database = postgres.prepare(watch.home.folder / "postgres", password=known.postgres_password)
        port = processes.free_port()
        database_url = postgres.url(database, port=port)
        clear = partial(postgres.clear_stale_pid, database)
        command = partial(postgres.serve, database, port=port)
        watch.add(Part("postgres", command, stop_signal=signal.SIGINT, stop_seconds=30, before=clear, is_server=True))
        own.append(("postgres", partial(postgres.accepts, database_url)))
    for name, accepts in own:
        _wait(watch, name, accepts, deadline=deadline)
    return database_url, broker_url


def _prepare(watch: Supervisor, environment: Mapping[str, str], deadline: float) -> None:
    """Migrations, method catalogue, administrator and key: what every start makes sure of."""
    command = _module(environment, "local.prepare")
    for _ in range(PREPARE_ATTEMPTS):
        if watch.run_once("prepare", command, seconds=max(deadline - time.monotonic(), 0)) == 0:
            break
    else:
        raise LocalError(f"the database could not be prepared; see {watch.home.log('prepare')}")
    known = homes.secrets_of(watch.home)
    watch.facts |= {"username": known.username, "password": known.password, "api_key": known.api_key}


def served_parts(environment: Mapping[str, str], doors: Doors, options: Options) -> Iterator[Part]:
    """Web and router, as docker-compose.yml starts them too."""
    gunicorn = ["gunicorn", "--worker-class", "gthread", "--no-control-socket", "--graceful-timeout", "10"]

    def served(application: str, door: socket.socket, workers: int, threads: int) -> Callable[[], Command]:
        listen = ["--bind", f"fd://{door.fileno()}", "--workers", str(workers), "--threads", str(threads)]
        return lambda: _program(environment, [*gunicorn, *listen, application], inherit=[door.fileno()])

    # A slow transfer holds a thread while it lasts. Sixteen served as many requests a second as four (1,500), and the
    # page still answered in 5 ms beside 24 slow uploads, where four threads left it waiting.
    yield Part("web", served("config.wsgi:application", doors.web, 2, 16))
    for number in range(1, options.routers + 1):
        # As many threads as web and workers may ask at once, so that who is one too many hears of it and does not wait.
        router = served("config.router:application", doors.router, 1, 40)
        # It keeps nothing, and taking its libraries apart at the end takes many times as long as a last answer.
        yield Part(_numbered("router", number), router, stop_seconds=3)


def worker_parts(home: Home, environment: Mapping[str, str], options: Options) -> Iterator[Part]:
    """Light and heavy workers and beat, as docker-compose.yml starts them too."""

    def worker(queue: str, node: str, *pool: str) -> Callable[[], Command]:
        quiet = ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        argv = ["celery", "-A", "workers.celery", "worker", "-Q", queue, "-n", f"{node}@%h", *pool, *quiet]
        return lambda: _program(environment, argv)

    yield Part("worker-light", worker("light", "light", "-P", "threads", "-c", "4"))
    for number in range(1, options.workers + 1):
        # One at a time in a child that is replaced now and then; torch is imported there and never in the parent.
        pool = ["-P", "prefork", "-c", "1", "--max-tasks-per-child", "200"]
        node = "heavy" if number == 1 else f"heavy{number}"
        yield Part(_numbered("worker-heavy", number), worker("heavy", node, *pool))
    beat = ["celery", "-A", "workers.celery", "beat", "--schedule", str(home.folder / "beat"), "--loglevel", "INFO"]
    yield Part("beat", lambda: _program(environment, beat), stop_seconds=5)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


@dataclass
class Seed:
    """The upload of the demo experts: it runs beside the start of the other parts and is done once in a home."""

    child: subprocess.Popen[bytes]
    done_file: Path
    log: Path

    def is_over(self) -> bool:
        status = self.child.poll()
        if status == 0:
            self.done_file.touch()
        elif status is not None:
            supervisor.say(f"the demo experts could not be uploaded; see {self.log}")
        return status is not None

    def end(self) -> None:
        if self.child.poll() is None:
            processes.end(self.child.pid, seconds=5)
        self.child.wait()


def _start_seed(watch: Supervisor, environment: Mapping[str, str]) -> Seed | None:
    done_file = watch.home.folder / "demo-loaded"
    # Who deletes a demo expert does not want it back at the next start.
    if done_file.exists():
        return None
    arguments = [str(PYTHON), str(ROOT / "manage.py"), "seed_demo", "--url", watch.facts["url"]]
    # The key goes by the environment: arguments can be read by every user of the machine.
    command = _program({**environment, "HUB_SEED_KEY": watch.facts["api_key"]}, arguments)
    log = watch.home.log("seed")
    with log.open("ab") as output:
        return Seed(child=processes.start(command, output=output), done_file=done_file, log=log)


def _module(environment: Mapping[str, str], name: str) -> Command:
    return _program(environment, [str(PYTHON), "-P", "-m", name])


def _program(environment: Mapping[str, str], argv: Sequence[str], *, inherit: Sequence[int] = ()) -> Command:
    """A program of the environment; a bare name is one of `.venv/bin`."""
    program = argv[0] if "/" in argv[0] else str(PYTHON.parent / argv[0])
    return Command(argv=[program, *argv[1:]], environment=environment, folder=ROOT, inherit=inherit)


def _missing(home: Home, answer: Mapping[str, Any], options: Options) -> str:
    """What a start that took too long is told: the parts that were not ready, why, and where to read on."""
    parts = list(supervisor.unready(answer)) or [("web", "no answer")]
    lines = [f"not ready after {options.timeout_seconds:.0f} s:"]
    for name, reason in parts:
        logs = " ".join(str(home.log(log)) for log in LOGS.get(name, (name,)))
        lines.append(f"  {name}: {reason}; see {logs}")
    return "\n".join(lines)


def _announce(watch: Supervisor) -> None:
    facts = watch.facts
    print(f"\nMoerge is ready: {facts['url']}", flush=True)
    print(f"  sign in as {facts['username']} with the password {facts['password']}")
    print(f"  API key    {facts['api_key']}")
    print(f"  home       {facts['home']} (logs in logs/)", flush=True)
