"""Headless Chromium for tests, found on this machine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium looks for its maker's hosts at every start; on a closed network that is noise and time.
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A running browser of Playwright (sync API); a skip says what was looked for and how to get it.

    Not for the whole session: while it is open Playwright's event loop runs, and Django refuses its database then.
    """
    from playwright.sync_api import Error, sync_playwright

    path = find_chromium()
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=flags)
        except Error as error:
            if path is not None:
                raise
            pytest.skip(
                f"no Chromium: CHROMIUM_PATH is not set, none of {', '.join(NAMES)} is on PATH, and Playwright has none "
                f"of its own ({str(error).strip().splitlines()[0]}). Get one: apt-get install chromium, or "
                ".venv/bin/playwright install chromium"
            )
        yield browser
        browser.close()


def find_chromium() -> str | None:
    """The program named by CHROMIUM_PATH, else one on PATH; None leaves the choice to Playwright."""
    given = os.environ.get("CHROMIUM_PATH")
    if given:
        assert Path(given).exists(), f"CHROMIUM_PATH={given}: there is no such file"
        return given
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@pytest.fixture
def page(chromium: object) -> Iterator[object]:
    """A page in a context of its own: no cookies of other tests."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(15_000)
    yield context.new_page()
    context.close()
