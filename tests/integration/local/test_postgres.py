"""The embedded PostgreSQL: started, attached to, killed, restarted and stopped, as root and as another user."""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest

from local import postgres, processes
from local.install import ROOT
from local.processes import Command, LocalError, User

PASSWORD = "it's 100% secret/@:"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data folder that was made once; tests copy it when they need one of their own."""
    folder = tmp_path_factory.mktemp("made")
    postgres.prepare(folder / "pg", password=PASSWORD)
    return folder / "pg"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    subprocess.run(["cp", "-a", str(made), str(tmp_path / "pg")], check=True)
    return tmp_path / "pg"


def running(folder, **settings):
    return postgres.running(folder, password=PASSWORD, log=folder / "log", settings=settings)


def test_a_server_answers_its_password_on_loopback_alone_and_is_gone_afterwards(folder):
    with running(folder) as url:
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT current_database(), current_user").fetchone() == ("moerge", "moerge")
            assert connection.execute(
                "SELECT lower('ÀÉ'), pg_encoding_to_char(encoding) FROM pg_database WHERE datname = 'moerge'"
            ).fetchone() == ("àé", "UTF8")
            connection.execute("CREATE EXTENSION pg_trgm")
            connection.execute("CREATE EXTENSION unaccent")
        postmaster = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
        listening = {(c.laddr.ip, c.laddr.port) for c in postmaster.net_connections() if c.status == "LISTEN"}
        assert listening == {("127.0.0.1", int(url.rsplit(":", 1)[1].split("/")[0]))}
        wrong = url.replace("moerge:", "moerge:x", 1)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)
        assert not postgres.accepts(wrong)
    assert not processes.alive(postmaster.pid)
    assert not postgres.accepts(url)


def test_only_the_data_changes_hands_and_no_password_is_left_in_a_file(folder):
    owner = processes.nobody().uid if os.geteuid() == 0 else os.geteuid()
    assert (folder / "data").stat().st_uid == owner
    assert (folder / "data").stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.geteuid()
    assert sorted(path.name for path in folder.iterdir()) == ["data", "lock"]


def test_two_that_start_one_fresh_folder_at_once_share_one_server(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from local import postgres
folder = Path({str(tmp_path / "pg")!r})
with postgres.running(folder, password="x", log=folder.parent / "log") as url:
    print(url, flush=True)
    sys.stdin.readline()
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        urls = list(pool.map(lambda child: child.stdout.readline().strip(), both))
    try:
        assert urls[0] == urls[1] != ""
        assert postgres.accepts(urls[0])
    finally:
        for child in both:
            child.communicate("done\n", timeout=60)
    assert not postgres.accepts(urls[0])


def test_committed_rows_survive_a_kill_of_the_server(folder):
    with running(folder) as url:
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept (n int)")
            connection.execute("INSERT INTO kept SELECT generate_series(1, 7)")
        server = postgres.prepare(folder, password=PASSWORD)
        pid = postgres.running_pid(server)
        os.kill(pid, signal.SIGKILL)
        assert not postgres.accepts(url)
    # The backends of the killed server need a moment to go, and PostgreSQL refuses to start beside them.
    deadline = time.monotonic() + 30
    total = None
    while total is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(LocalError), running(folder) as url, psycopg.connect(url) as connection:
            total = connection.execute("SELECT sum(n) FROM kept").fetchone()
    assert total == (28,)


def test_the_pid_file_of_a_server_that_is_no_more_does_not_stop_a_start(folder):
    server = postgres.prepare(folder, password=PASSWORD)
    # This very process has the number now, as after a reboot.
    (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}\n1\n5432\n\n127.0.0.1\n0 0\nready\n")
    assert postgres.running_pid(server) == os.getpid()
    with running(folder) as url:
        assert postgres.accepts(url)


def test_the_pid_file_of_a_running_server_is_left_alone(folder):
    with running(folder):
        server = postgres.prepare(folder, password=PASSWORD)
        postgres.clear_stale_pid(server)
        assert (folder / "data" / "postmaster.pid").exists()


def test_what_an_interrupted_start_left_half_made_is_made_again(tmp_path):
    half = tmp_path / "pg" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server = postgres.prepare(tmp_path / "pg", password=PASSWORD)
    assert (server.data / "PG_VERSION").exists()
    assert not half.exists()
    assert not (tmp_path / "pg" / "password").exists()


def test_a_start_that_cannot_work_says_where_to_read_on(folder):
    with pytest.raises(LocalError, match=r"ended at once; see .*log"), running(folder, shared_buffers="nonsense"):
        pass
    assert "nonsense" in (folder / "log").read_text()


def test_a_server_dies_with_the_process_that_started_it(folder):
    script = f"""
import os, signal
from pathlib import Path
from local import postgres
folder = Path({str(folder)!r})
with postgres.running(folder, password={PASSWORD!r}, log=folder / "log") as url:
    print(postgres.running_pid(postgres.prepare(folder, password={PASSWORD!r})), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while processes.alive(pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)


@pytest.fixture
def closed_programs():
    """Programs of PostgreSQL in a folder that only its owner may enter, below one that all may."""
    top = Path(tempfile.gettempdir()) / f"moerge-closed-{os.getpid()}"
    closed = top / "closed"
    closed.mkdir(parents=True)
    top.chmod(0o755)
    package = postgres.packaged_programs().parent.parent
    for source in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, closed / source.name, symlinks=True)
    closed.chmod(0o700)
    yield closed / package.name / "pginstall" / "bin"
    shutil.rmtree(top, ignore_errors=True)


def test_programs_that_the_servers_user_cannot_reach_are_copied_beside_the_data(closed_programs):
    folder = closed_programs.parents[3] / "pg"
    server = postgres.prepare(folder, password=PASSWORD, programs=closed_programs)
    is_root = os.geteuid() == 0
    assert server.programs.is_relative_to(folder) == is_root
    assert (server.programs == closed_programs) != is_root
    assert (server.data / "PG_VERSION").exists()


def test_a_checkout_in_a_closed_folder_keeps_its_data_and_its_programs_there(closed_programs):
    folder = closed_programs.parents[2] / "pg"
    server = postgres.prepare(folder, password=PASSWORD, programs=closed_programs)
    assert server.programs == closed_programs
    assert not (folder / "programs").exists()
    port = processes.free_port()
    with (folder / "log").open("ab") as log:
        child = processes.start(postgres.serve(server, port=port), output=log)
    try:
        deadline = time.monotonic() + 30
        while not postgres.accepts(postgres.url(server, port=port)):
            assert child.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Of all the rights of root the server has the one that passes folders, and no other.
        if os.geteuid() == 0:
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert re.search(r"^CapEff:\t0+[24]$", status, re.MULTILINE)
            assert psutil.Process(child.pid).uids().effective == processes.nobody().uid
    finally:
        processes.end(child.pid, first=signal.SIGINT, seconds=20)
        child.wait()


def test_an_ordinary_user_runs_a_server_without_changing_any_owner(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    user = None
    if os.geteuid() == 0:
        # `sees_all` lets this user read the interpreter of the tests, which may lie in a closed home.
        daemon = pwd.getpwnam("daemon")
        user = User(name="daemon", uid=daemon.pw_uid, gid=daemon.pw_gid, sees_all=True)
        os.chown(folder, user.uid, user.gid)
    script = f"""
import os
from pathlib import Path
from local import postgres
folder = Path({str(folder)!r})
assert os.geteuid() != 0
with postgres.running(folder / "pg", password="x", log=folder / "log") as url:
    assert postgres.accepts(url)
owners = {{path.stat().st_uid for path in folder.rglob("*")}}
assert owners == {{os.geteuid()}}, owners
print("fine")
"""
    command = Command([sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(ROOT)}, Path("/"), user=user)
    assert processes.run(command).strip().endswith("fine")
