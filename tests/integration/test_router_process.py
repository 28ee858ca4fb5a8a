"""The router as the process it is: gunicorn, its own connection to the database, words alone at first."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from django.db import connection

from registry.services import routing
from tests.integration.routables import expert, published

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def process(settings, tmp_path, transactional_db):
    """A router process that just began, on a socket of this test."""
    door = socket.create_server(("127.0.0.1", 0))
    known = connection.settings_dict
    address = f"postgresql://{known['USER']}:{known['PASSWORD']}@{known['HOST']}:{known['PORT']}/{known['NAME']}"
    argv = [
        "-m",
        "gunicorn",
        "config.router:application",
        "--workers=1",
        "--threads=4",
        "--graceful-timeout=1",
        f"--bind=fd://{door.fileno()}",
    ]
    log = (tmp_path / "log").open("wb")
    child = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": address, "HUB_ROUTER_SECRET": settings.HUB_ROUTER_SECRET},
        pass_fds=[door.fileno()],
        stdout=log,
        stderr=log,
    )
    yield f"http://127.0.0.1:{door.getsockname()[1]}"
    child.terminate()
    child.wait(timeout=60)
    log.close()
    door.close()


def test_a_router_process_answers_by_words_while_its_encoder_loads_and_follows_the_log(process, router, settings):
    first = published("ann/travel", "book a flight")
    later = expert("ann/kitchen", "boil an egg")
    routing.embed(later)
    settings.HUB_ROUTER_URL = process
    health = until_it_answers(process)
    assert health["encoder"] == "loading"
    answer = routing.route(viewer=None, text="a flight", min_seq=1)
    assert [result["expert"] for result in answer["results"]] == ["ann/travel"]
    assert (answer["degraded"], answer["index_seq"]) == (True, 1)
    seq = routing.publish_to_index(later)
    answer = routing.route(viewer=None, text="egg", min_seq=seq)
    assert [result["revision"] for result in answer["results"]] == [later.commit]
    routing.withdraw(first.expert)
    assert routing.route(viewer=None, text="flight", min_seq=3)["results"] == []


def until_it_answers(url):
    """The router's first answer about itself that knows the index."""
    limit = time.monotonic() + 60
    while True:
        try:
            health = httpx.get(url + "/health", timeout=60).json()
        except httpx.TransportError:
            health = {}
        if health.get("index") == "ready":
            return health
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_kept_connection_that_the_router_closed_costs_no_answer(settings):
    """A server that answers one request per connection and hangs up in the middle of the next."""
    door = socket.create_server(("127.0.0.1", 0))
    served = []

    def serve():
        while True:
            try:
                line, _ = door.accept()
            except OSError:
                return
            with line, line.makefile("rb") as reader:
                for number in range(2):
                    while (header := reader.readline()) not in (b"\r\n", b""):
                        if header.startswith(b"GET"):
                            served.append(number)
                    if number == 0:
                        body = json.dumps({"encoder": "ready"}).encode()
                        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    threading.Thread(target=serve, daemon=True).start()
    settings.HUB_ROUTER_URL = f"http://127.0.0.1:{door.getsockname()[1]}"
    try:
        assert [routing.router_health() for _ in range(3)] == [{"encoder": "ready"}] * 3
    finally:
        door.close()
    # The second and the third request each met a closed line first.
    assert served == [0, 1, 0, 1, 0]
