"""The router as the process it is: gunicorn, its own connection to the database, words alone at first."""

import json
import socket
import threading

import httpx
import pytest

from registry.services import routing
from tests.integration.routables import expert, published, router_process, until


@pytest.fixture
def process(tmp_path, transactional_db):
    """The address of a router process that just began."""
    with router_process(tmp_path / "log", tmp_path) as (url, _):
        yield url


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
    found = []

    def knows_the_index():
        try:
            found.append(httpx.get(url + "/health", timeout=60).json())
        except httpx.TransportError:
            return False
        return found[-1]["index"] == "ready"

    until(knows_the_index)
    return found[-1]


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
