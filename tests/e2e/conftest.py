"""The whole hub as `bin/run` starts it, once for all tests of this folder, and a browser for its pages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import hubs
from tests.hubs import Hub


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Where a run has several processes, one of them has the hub, and so all tests of it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("hub"))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running hub with the demo experts, started exactly as a user starts it."""
    home: Path = tmp_path_factory.mktemp("hub")
    started = hubs.start(home)
    yield started
    hubs.stop(home)
