"""The command as a user runs it, in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moerge.cli import main
from tests import tiny


@dataclass
class Done:
    """What a command left: its exit status and its words."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def moerge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `moerge` with these arguments and without the environment of whoever runs the tests."""
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Done(status, printed.out, printed.err)

    return run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a LoRA."""
    return tiny.write(tiny.lora(seed=3, rank=8, modules=(tiny.QUERY, tiny.VALUE)), tmp_path / "adapter")


@pytest.fixture
def compressed(adapter: Path, moerge: Command, tmp_path: Path) -> Path:
    """That LoRA as a compeft file."""
    done = moerge("compress", adapter, tmp_path / "tea.compeft", "--density", "0.1", "--quiet")
    assert done.status == 0, done.err
    return tmp_path / "tea.compeft"
