"""The encoder, loaded once, routers that use it, and the queues of the broker."""

import importlib
import sys

import pytest
from celery import current_app

from registry.services import encoders
from registry.services.router import Router
from tests.integration.routables import serving


def pytest_collection_finish(session):
    """PEFT takes seconds to import, and a job in the transaction of a test may not be silent for that long."""
    of_merges = ("tests/integration/test_merge", "tests/integration/test_route_merge")
    is_named = any(item.nodeid.startswith(of_merges) for item in session.items)
    if is_named or "tests.integration.merges" in sys.modules:
        importlib.import_module("workers.skeleton")


@pytest.fixture(scope="session")
def encoder():
    from moerge.embedding import encoder

    return encoder.load()


@pytest.fixture
def router(settings, encoder):
    """A router with its encoder, at the address that the settings name; it follows the log when `refresh` is called."""
    made = Router(load=lambda row: encoder)
    made.line(encoders.packaged()).loader.join()
    with serving(made) as url:
        settings.HUB_ROUTER_URL = url
        yield made


@pytest.fixture(autouse=True)
def quick_passwords(settings):
    """Making a user must not cost the third of a second that a good hash costs."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def queue():
    """How many messages wait in a queue of the broker, beginning with none."""
    with current_app.connection_for_write() as link:
        channel = link.default_channel
        lists = {
            name: [channel._q_for_pri(name, step) for step in channel.priority_steps] for name in ("light", "heavy")
        }
        channel.client.delete(*lists["light"], *lists["heavy"])
        yield lambda name: sum(channel.client.llen(part) for part in lists[name])
        channel.client.delete(*lists["light"], *lists["heavy"])
