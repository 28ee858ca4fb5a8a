"""The commands of contracts: a hub started, asked, managed, killed, started again and stopped as a user does it."""

import json
import os
import pwd
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from local import processes
from local.processes import Command, User
from tests import hubs
from tests.hubs import ROOT, Hub

PARTS = {"postgres", "redis", "web", "router", "worker-light", "worker-heavy", "beat"}


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, timeout=20, trust_env=False)


def test_the_record_of_a_hub_names_its_parts_and_is_for_its_owner_alone(hub: Hub):
    path = hub.home / "run.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    record = json.loads(path.read_text())
    assert {"url", "home", "username", "password", "api_key", "processes"} <= set(record)
    assert set(record["processes"]) == PARTS
    assert all(processes.alive(pid) for pid in record["processes"].values())
    assert stat.S_IMODE((hub.home / "secrets.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((hub.home / "logs" / "web.log").stat().st_mode) & 0o077 == 0


def test_a_ready_hub_says_so_part_by_part_and_knows_its_key(hub: Hub):
    ready = get(f"{hub.url}/readyz")
    assert ready.status_code == 200
    assert ready.json()["ready"] is True
    parts = ready.json()["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(
        ("web", "database", "broker", "router", "workers"), "ready"
    )
    assert get(f"{hub.url}/healthz").status_code == 200
    assert get(f"{hub.url}/api/whoami-v2", **hub.headers).json()["name"] == hub.username
    assert get(f"{hub.url}/api/whoami-v2").status_code == 401


def test_starting_a_hub_that_runs_prints_the_same_record_and_starts_nothing(hub: Hub):
    before = hub.processes
    done = hubs.run("--detach", "--home", str(hub.home))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    printed = json.loads(done.stdout)
    assert printed["processes"] == hub.processes == before
    assert (printed["url"], printed["api_key"]) == (hub.url, hub.api_key)
    other = hubs.run("--detach", "--home", str(hub.home), "--port", "1234")
    assert other.returncode == 1
    assert hub.url in other.stderr


def test_a_port_that_is_taken_is_said_at_once_and_nothing_is_left(hub: Hub, tmp_path: Path):
    port = hub.url.rpartition(":")[2]
    done = hubs.run("--detach", "--home", str(tmp_path / "home"), "--port", port, "--no-demo")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"port {port}" in done.stderr
    assert not (tmp_path / "home" / "children.json").exists()


def test_a_hub_that_is_not_ready_in_time_names_the_part_and_its_log_and_leaves_no_process(tmp_path: Path):
    home = tmp_path / "home"
    # Nothing listens there, so the first part that needs the database is never done.
    nowhere = f"postgresql://nobody:x@127.0.0.1:{processes.free_port()}/none"
    done = hubs.run("--detach", "--home", str(home), "--port", "0", "--timeout", "3", "--no-demo", DATABASE_URL=nowhere)
    assert done.returncode == 1
    assert done.stdout == ""
    assert str(home / "logs" / "prepare.log") in done.stderr
    assert not [pid for pid in pids_of(home) if processes.alive(pid)]


def pids_of(home: Path) -> list[int]:
    """Processes whose environment names this home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"HUB_HOME={home}".encode() in environment:
            found.append(int(entry.name))
    return found


def test_manage_speaks_to_the_running_hub(hub: Hub):
    home = ["--home", str(hub.home)]
    made = hubs.command("manage", "create_user", "reader", *home)
    assert made.returncode == 0, made.stderr
    key = hubs.command("manage", *home, "create_key", "reader", "--scopes", "read")
    assert key.returncode == 0, key.stderr
    assert len(key.stdout.splitlines()) == 1
    whoami = get(f"{hub.url}/api/whoami-v2", Authorization=f"Bearer {key.stdout.strip()}")
    assert whoami.json()["name"] == "reader"
    assert hubs.command("manage", "create_key", "nobody-here", "--scopes", "read", *home).returncode == 1
    assert hubs.command("manage", "no_such_command", *home).returncode == 2
    assert hubs.command("manage", "verify_blobs", *home).returncode == 0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Iterator[tuple[Path, User | None]]:
    """A folder of an ordinary user, and that user; None when the tests do not run as root, so are one themselves."""
    folder = tmp_path_factory.mktemp("theirs")
    user = None
    if os.geteuid() == 0:
        record = pwd.getpwnam("daemon")
        # The interpreter of the tests may lie in a closed home; `sees_all` lets this user read it, and no more.
        user = User(name="daemon", uid=record.pw_uid, gid=record.pw_gid, sees_all=True)
        os.chown(folder, user.uid, user.gid)
    yield folder, user
    as_user(user, "--stop", "--home", str(folder / "home"))


def as_user(user: User | None, *arguments: str) -> str:
    argv = [str(ROOT / "bin" / "run"), *arguments]
    return processes.run(Command(argv, hubs.environment(), Path("/"), user=user), seconds=420)


def test_an_ordinary_user_starts_a_hub_whose_supervisor_is_killed_and_starts_it_again(theirs):
    folder, user = theirs
    home = folder / "home"
    start = ["--detach", "--home", str(home), "--port", "0", "--no-demo", "--workers", "2", "--routers", "2"]
    first = json.loads(as_user(user, *start))
    assert set(first["processes"]) == PARTS | {"worker-heavy-2", "router-2"}
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in first["processes"].values()}
    assert owners == {user.uid if user else os.geteuid()}
    family = pids_of(home)

    os.kill(first["supervisor"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(processes.alive(pid) for pid in [*first["processes"].values(), *family]):
        assert time.monotonic() < deadline, "processes outlived their supervisor"
        time.sleep(0.2)

    # The next start is one in the foreground, ended by Ctrl-C.
    argv = [str(ROOT / "bin" / "run"), *(argument for argument in start if argument != "--detach")]
    child = processes.start(Command(argv, hubs.environment(), Path("/"), user=user), output=subprocess.PIPE)
    said = []
    while not said or "Moerge is ready" not in said[-1]:
        said.append(child.stdout.readline().decode())
        assert said[-1], "".join(said)
    second = json.loads((home / "run.json").read_text())
    assert second["url"] in said[-1]
    assert not set(second["processes"].values()) & set(first["processes"].values())
    headers = {"Authorization": f"Bearer {first['api_key']}"}
    assert get(f"{second['url']}/api/whoami-v2", **headers).json()["name"] == first["username"]
    assert get(f"{second['url']}/api/v1/experts").json()["items"] == []

    child.send_signal(signal.SIGINT)
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert not [pid for pid in second["processes"].values() if processes.alive(pid)]
    assert not pids_of(home)
    assert not (home / "run.json").exists()
    # Stopping what does not run is no error.
    as_user(user, "--stop", "--home", str(home))
