"""The whole hub as `bin/run` starts it, once for all tests of this folder, and a browser for its pages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hubs
from tests.hubs import Hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running hub with the demo experts, started exactly as a user starts it."""
    home: Path = tmp_path_factory.mktemp("hub")
    started = hubs.start(home)
    yield started
    hubs.stop(home)
