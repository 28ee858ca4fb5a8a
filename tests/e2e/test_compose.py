"""Every service of docker-compose.yml, started by exactly its command and environment, carries an upload through.

There is no engine here: names of hosts are mapped to this machine, ports to free ones, and the volume to a folder.
PostgreSQL and Redis are the embedded ones, with the user, database and password that the file gives them.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from local import postgres, processes, redis, supervisor
from local.install import PYTHON, ROOT
from local.processes import Command
from tests import compose, tiny
from tests.uploader import Uploader

VARIABLES = {
    "HUB_SECRET_KEY": "compose-secret-" + "x" * 40,
    "HUB_ROUTER_SECRET": "compose-router-" + "y" * 40,
    "POSTGRES_PASSWORD": "compose-postgres",
    "REDIS_PASSWORD": "compose-redis",
}
SERVED = ("web", "router", "worker-light", "worker-heavy", "beat")


@dataclass
class Composed:
    """The file with its variables filled in and its places mapped, and the processes that were started from it."""

    services: Mapping[str, Any]
    folder: Path
    url: str
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(self, argv: list[str], environment: Mapping[str, str]) -> Command:
        """A command as the image runs it: its folder, its PATH and the ENV lines of the Dockerfile."""
        image = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DJANGO_SETTINGS_MODULE": "config.settings"}
        path = f"{PYTHON.parent}:{os.defpath}"
        program = str(PYTHON.parent / argv[0]) if (PYTHON.parent / argv[0]).exists() else argv[0]
        return Command([program, *argv[1:]], {"PATH": path, **image, **environment}, ROOT)

    def start(self, name: str) -> None:
        service = self.services[name]
        self.run_beside(name, self.command(service["command"], service["environment"]))

    def run_beside(self, name: str, command: Command) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.children[name] = processes.start(command, output=log)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def manage(self, *arguments: str) -> str:
        """What `docker compose exec web python manage.py ...` prints."""
        return processes.run(
            self.command(["python", "manage.py", *arguments], self.services["web"]["environment"])
        ).strip()

    def wait(self, name: str, condition: Any, *, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.children[name].poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} is not ready:\n{self.log(name)}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> Iterator[Composed]:
    folder = tmp_path_factory.mktemp("compose")
    ports = {name: processes.free_port() for name in ("postgres", "redis", "web", "router")}
    places = {
        "postgres:5432": f"127.0.0.1:{ports['postgres']}",
        "redis:6379": f"127.0.0.1:{ports['redis']}",
        "router:8100": f"127.0.0.1:{ports['router']}",
        "0.0.0.0:8100": f"127.0.0.1:{ports['router']}",
        "0.0.0.0:8000": f"127.0.0.1:{ports['web']}",
        "http://127.0.0.1:8000": f"http://127.0.0.1:{ports['web']}",
    }
    # Variables are filled in after the file is read, as compose does it.
    services = compose.mapped(compose.load()["services"], lambda text: compose.filled(text, VARIABLES))
    places["/data"] = str(folder / "data")
    for place, here in places.items():
        assert place in str(services), place
        services = compose.mapped(services, lambda text, place=place, here=here: text.replace(place, here))
    made = Composed(services=services, folder=folder, url=f"http://127.0.0.1:{ports['web']}")
    (folder / "data").mkdir()
    try:
        start_servers(made, ports)
        prepared = services["prepare"]
        processes.run(made.command(prepared["command"], prepared["environment"]))
        for name in SERVED:
            made.start(name)
        yield made
    finally:
        for name in SERVED:
            if name in made.children:
                made.children[name].terminate()
        for name, child in reversed(made.children.items()):
            first = signal.SIGINT if name == "postgres" else signal.SIGTERM
            processes.end(child.pid, first=first, seconds=15)
            child.wait()


def start_servers(made: Composed, ports: Mapping[str, int]) -> None:
    wanted = made.services["postgres"]["environment"]
    assert (wanted["POSTGRES_USER"], wanted["POSTGRES_DB"]) == (postgres.NAME, postgres.NAME)
    database = postgres.prepare(made.folder / "postgres", password=wanted["POSTGRES_PASSWORD"])
    made.run_beside("postgres", postgres.serve(database, port=ports["postgres"], settings=postgres.CARELESS))
    made.wait("postgres", lambda: postgres.accepts(postgres.url(database, port=ports["postgres"])))
    program, *arguments = made.services["redis"]["command"]
    assert program == "redis-server"
    (made.folder / "redis").mkdir()
    place = ["--port", str(ports["redis"]), "--bind", "127.0.0.1", "--dir", str(made.folder / "redis")]
    made.run_beside("redis", Command([str(redis.find_program()), *arguments, *place], {}, made.folder))
    made.wait("redis", lambda: redis.accepts(f"redis://:{VARIABLES['REDIS_PASSWORD']}@127.0.0.1:{ports['redis']}/0"))


def test_an_expert_that_is_uploaded_to_the_composed_services_becomes_ready_is_found_and_comes_back(composed: Composed):
    composed.wait("web", lambda: supervisor.ask(f"{composed.url}/healthz")[0] == 200)
    _, *check = composed.services["web"]["healthcheck"]["test"]
    processes.run(composed.command(check, composed.services["web"]["environment"]))

    composed.manage("create_user", "boss", "--admin")
    uploader = Uploader(composed.url, composed.manage("create_key", "boss", "--scopes", "read,write"))
    tree = tiny.lora(seed=5, rank=16, task="Sorts letters about lost umbrellas.")
    commit = uploader.upload("boss/umbrellas", tree)

    composed.wait("router", lambda: supervisor.ask(f"{composed.url}/readyz", seconds=5)[0] == 200)
    expert = uploader.until(
        "/api/v1/experts/boss/umbrellas", lambda answer: answer["state"] in {"ready", "failed"}, seconds=120
    )
    assert expert["state"] == "ready", expert
    assert expert["compressed"]["bytes"] < expert["compressed"]["original_bytes"]
    question = {"text": "Who sorts letters about lost umbrellas?", "min_score": 0}
    # The router follows the table of changes, so an expert is found a moment after it is ready.
    deadline = time.monotonic() + 60
    while not (found := uploader.client.post("/api/v1/route", json=question).json())["results"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert found["results"][0]["expert"] == "boss/umbrellas"
    path = f"/boss/umbrellas/resolve/{commit}/adapter_model.safetensors"
    assert uploader.client.get(path, follow_redirects=True).content == tree["adapter_model.safetensors"]
    uploader.close()
    assert [name for name, child in composed.children.items() if child.poll() is not None] == []
    composed.wait("beat", lambda: "sweep" in composed.log("beat"), seconds=60)
