"""The home folder of one hub: where everything it keeps lies, its secrets, and what runs now.

secrets.json   made once, mode 0600: keys and passwords of this hub
run.json       mode 0600: the URL, the administrator and the processes, kept current while the hub runs
children.json  what the supervisor started, so that the next start can end what a killed supervisor left
lock           held by the supervisor as long as it lives
postgres/ redis/ blobs/ staging/ logs/
"""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from local.install import ROOT, VENV
from local.processes import LocalError


@dataclass(frozen=True)
class Secrets:
    """What nobody else may know. `api_key` is empty until the hub has made it."""

    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(48))
    router_secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    postgres_password: str = field(default_factory=lambda: secrets.token_hex(24))
    redis_password: str = field(default_factory=lambda: secrets.token_hex(24))
    username: str = "admin"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    api_key: str = ""


@dataclass(frozen=True)
class Home:
    folder: Path

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def run_file(self) -> Path:
        return self.folder / "run.json"

    @property
    def children_file(self) -> Path:
        return self.folder / "children.json"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def default_folder() -> Path:
    return Path(os.environ.get("HUB_HOME") or ROOT / "var")


def given_database_url() -> str:
    return os.environ.get("DATABASE_URL", "")


def given_broker_url() -> str:
    return os.environ.get("BROKER_URL", "")


def make(folder: Path) -> Home:
    """The home in this folder, made when absent; LocalError when that is not allowed."""
    home = Home(folder.expanduser().resolve())
    try:
        if not home.folder.exists():
            home.folder.mkdir(parents=True)
            # The server of the database may run as another user, who must pass this folder and no more.
            home.folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
        home.logs.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LocalError(
            f"the home {home.folder} cannot be used: {error.strerror}; name another with --home"
        ) from error
    return home


def secrets_of(home: Home) -> Secrets:
    """The secrets of this home, made at the first call."""
    path = home.folder / "secrets.json"
    with locked(home.folder / "secrets.lock"):
        if path.exists():
            try:
                return Secrets(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise LocalError(f"{path} is damaged ({error}); put back a copy or use another --home") from error
        made = Secrets()
        write_private(path, asdict(made))
        return made


def keep_api_key(home: Home, key: str) -> Secrets:
    kept = replace(secrets_of(home), api_key=key)
    with locked(home.folder / "secrets.lock"):
        write_private(home.folder / "secrets.json", asdict(kept))
    return kept


def write_private(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON that only its owner may read, in one step: a reader sees the old file or the new one."""
    half = path.with_name(f"{path.name}.{os.getpid()}.new")
    half.unlink(missing_ok=True)
    handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as out:
        json.dump(record, out, indent=2)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    half.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The record in the file; empty when there is none or it is not JSON."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def take(home: Home) -> None:
    """Take the home for the life of this process; LocalError when another supervisor has it."""
    handle = os.open(home.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A question of `holder` holds it for a moment too.
            time.sleep(0.05)
            continue
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        return
    raise LocalError(f"a hub of {home.folder} runs already; this stops it: bin/run --stop --home {home.folder}")


def holder(home: Home) -> int | None:
    """The process that has taken the home, None when nobody has."""
    with (home.folder / "lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            return int(handle.read() or 0) or None
    return None


def environment(home: Home, *, database_url: str, broker_url: str, router_url: str) -> dict[str, str]:
    """The environment in which every process of this hub runs."""
    known = secrets_of(home)
    return {
        **os.environ,
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "HUB_HOME": str(home.folder),
        "HUB_SECRET_KEY": known.secret_key,
        "HUB_ROUTER_SECRET": known.router_secret,
        "HUB_ROUTER_URL": router_url,
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
    }
