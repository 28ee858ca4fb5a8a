"""What every run of the tests knows: its command-line options, its servers and the settings of the project."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Nothing of a hub on this machine may leak into a run, nor the other way round.
os.environ.update(
    DJANGO_SETTINGS_MODULE="config.settings",
    HUB_HOME=tempfile.mkdtemp(prefix="moerge-test-home-"),
    HUB_SECRET_KEY="tests-" + "0123456789" * 5,
    HUB_ROUTER_SECRET="tests-router",
    HUB_RATE_LIMITS="off",
)

# Where collected files would lie; the web process warns when there is no such folder.
Path(os.environ["HUB_HOME"], "static").mkdir()

# Test files import models at their top, so Django must be set up before the first is collected.
import django  # noqa: E402

django.setup()

from django.conf import settings as _settings  # noqa: E402

# Slow hashes protect stolen passwords; those of tests are in the source.
_settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

pytest_plugins = ["tests.servers", "tests.suites", "tests.browsers"]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HUB_HOME"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden", "outputs of reference implementations")
    group.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        help="folder with golden cases: compeft/ and merging/, or one of the two itself (default: tests/golden/data)",
    )
    group.addoption(
        "--golden-allow-unbuilt",
        action="store_true",
        default=False,
        help="skip golden cases of merge methods that are not built, instead of failing them",
    )
    parser.addoption(
        "--data-dir",
        type=Path,
        default=None,
        help="folder with the CSV files the demo experts were trained on, for questions from their test split",
    )
