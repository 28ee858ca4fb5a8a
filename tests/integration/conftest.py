"""The encoder, loaded once, and routers that use it."""

import pytest

from registry.services.router import Router
from tests.integration.routables import serving


@pytest.fixture(scope="session")
def encoder():
    from moerge.embedding import encoder

    return encoder.load()


@pytest.fixture
def router(settings, encoder):
    """A router with its encoder, at the address that the settings name; it follows the log when `refresh` is called."""
    made = Router(load=lambda: encoder)
    made._loader.start()
    made._loader.join()
    with serving(made) as url:
        settings.HUB_ROUTER_URL = url
        yield made


@pytest.fixture(autouse=True)
def quick_passwords(settings):
    """Making a user must not cost the third of a second that a good hash costs."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
