"""A scripted server, a clock that only sleeping moves, and a client that uses both."""

from collections.abc import Iterator

import pytest

from moerge.client import Hub
from moerge.client.patience import Patience
from tests.unit.client import servers


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def server() -> Iterator[servers.Server]:
    with servers.running() as found:
        yield found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def seen() -> list[tuple[str, float | None]]:
    """What the client has told its watcher."""
    return []


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(server, clock, seen) -> Iterator[Hub]:
    with Hub(
        server.url,
        "key-1",
        wait_seconds=60,
        progress=lambda what, share: seen.append((what, share)),
        patience=lambda seconds: Patience(seconds, clock=clock, sleep=clock.sleep),
    ) as found:
        yield found
