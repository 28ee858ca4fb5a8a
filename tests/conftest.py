"""What every run of the tests knows: its command-line options."""

from pathlib import Path

import pytest


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
