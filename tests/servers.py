"""PostgreSQL and Redis of a test run: own servers in a temporary folder, made when the first test asks for them.

`DATABASE_URL` and `BROKER_URL` name others. Django learns the address when the servers run, so that tests without a
database start nothing.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

GIVEN_DATABASE_URL = os.environ.get("DATABASE_URL", "")
GIVEN_BROKER_URL = os.environ.get("BROKER_URL", "")


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """A folder for servers that every user may enter, unlike pytest's own: PostgreSQL may run as another one."""
    folder = Path(tempfile.mkdtemp(prefix="moerge-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def database_url(server_home: Path) -> Iterator[str]:
    """The URL of the PostgreSQL server of this run, as `DATABASE_URL` would be given."""
    if GIVEN_DATABASE_URL:
        yield GIVEN_DATABASE_URL
        return
    from local import postgres

    folder, log = server_home / "postgres", server_home / "postgres.log"
    with postgres.running(folder, password=secrets.token_hex(16), log=log, settings=postgres.CARELESS) as address:
        yield address


@pytest.fixture(scope="session")
def broker_url(server_home: Path) -> Iterator[str]:
    """The URL of the Redis server of this run, as `BROKER_URL` would be given."""
    if GIVEN_BROKER_URL:
        yield GIVEN_BROKER_URL
        return
    from local import redis

    folder, log = server_home / "redis", server_home / "redis.log"
    with redis.running(folder, password=secrets.token_hex(16), log=log) as address:
        yield address


@pytest.fixture(scope="session")
def django_db_modify_db_settings(database_url: str, broker_url: str) -> None:
    """Point Django and Celery at the servers of this run before the test database is made."""
    from django.conf import settings
    from django.db import connections

    from config import env
    from workers.celery import app

    os.environ["DATABASE_URL"] = database_url
    os.environ["BROKER_URL"] = broker_url
    record = env.database()
    for databases in (settings.DATABASES, connections.settings):
        databases["default"].update(record)
    settings.CELERY_BROKER_URL = broker_url
    app.conf.broker_url = broker_url


@pytest.fixture(autouse=True)
def own_files(request: pytest.FixtureRequest) -> None:
    """A test that has the database has blobs of its own too."""
    if not {"db", "transactional_db", "django_db_setup", "live_server"}.isdisjoint(request.fixturenames):
        request.getfixturevalue("blobs_folder")


@pytest.fixture
def blobs_folder(tmp_path: Path, settings) -> Path:
    """The empty folder in which the storage of this test keeps its blobs."""
    for name in ("HUB_BLOBS_DIR", "HUB_STAGING_DIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        setattr(settings, name, folder)
    settings.HUB_HOME = tmp_path
    return settings.HUB_BLOBS_DIR
