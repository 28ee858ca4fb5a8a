"""A whole hub of real processes, started and stopped by the commands that a user types."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local import processes

ROOT = Path(__file__).resolve().parent.parent
# Of these the hub under test must know nothing: they belong to the run of the tests.
FOREIGN = ("DATABASE_URL", "BROKER_URL", "DJANGO_SETTINGS_MODULE", "HUB_")


@dataclass(frozen=True)
class Hub:
    """A running hub: where it is, who its administrator is, and the processes it was started with."""

    url: str
    home: Path
    username: str
    password: str
    api_key: str
    supervisor: int

    @property
    def processes(self) -> dict[str, int]:
        """Name -> pid, as of now."""
        return self.record()["processes"]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def doors(self) -> dict[str, str]:
        """`database_url`, `broker_url` and `router_url` of this hub."""
        return self.record()["doors"]

    def record(self) -> dict[str, Any]:
        return json.loads((self.home / "run.json").read_text())


def environment() -> dict[str, str]:
    """The environment of a user's terminal: this one without what the tests put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def run(*arguments: str, seconds: float = 420, **extra: str) -> subprocess.CompletedProcess[str]:
    """`bin/run` with these arguments."""
    return command("run", *arguments, seconds=seconds, **extra)


def command(name: str, *arguments: str, seconds: float = 120, **extra: str) -> subprocess.CompletedProcess[str]:
    """A script of bin/, with its outputs."""
    return subprocess.run(
        [str(ROOT / "bin" / name), *arguments],
        env={**environment(), **extra},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def start(home: Path, *arguments: str, **extra: str) -> Hub:
    done = run("--detach", "--home", str(home), "--port", "0", *arguments, **extra)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    names = ("url", "username", "password", "api_key", "supervisor")
    return Hub(home=Path(record["home"]), **{name: record[name] for name in names})


def stop(home: Path) -> None:
    """Stop the hub of this home; none of its processes may be left."""
    record = json.loads((home / "run.json").read_text())
    done = run("--stop", "--home", str(home))
    assert done.returncode == 0, done.stderr
    left = [pid for pid in [*record["processes"].values(), record["supervisor"]] if processes.alive(pid)]
    assert not left, f"left by --stop: {left}"
