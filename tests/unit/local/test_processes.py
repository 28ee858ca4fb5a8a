"""Starting and ending processes: users, ports and folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local import processes, redis
from local.processes import Command, LocalError, User


def test_a_command_that_fails_tells_what_it_said(tmp_path):
    command = Command([sys.executable, "-c", "import sys; print('out'); sys.exit('why')"], os.environ, tmp_path)
    with pytest.raises(LocalError, match=r"ended with 1:\n(.|\n)*why"):
        processes.run(command)


def test_a_child_leads_a_session_of_its_own_and_gets_only_the_environment_it_was_given(tmp_path):
    script = "import os; print(os.getsid(0) == os.getpid(), sorted(k for k in os.environ if k != 'LC_CTYPE'))"
    said = processes.run(Command([sys.executable, "-c", script], {"ONE": "1"}, tmp_path))
    assert said.strip() == "True ['ONE']"


def test_a_socket_that_is_handed_on_is_open_in_the_child_and_no_other_file_is(tmp_path):
    reading, writing = os.pipe()
    other, another = os.pipe()
    os.set_inheritable(other, True)
    script = f"import os; os.fstat({writing}); os.write({writing}, b'x')\ntry: os.fstat({other})\nexcept OSError: print('closed')"
    command = Command([sys.executable, "-c", script], os.environ, tmp_path, inherit=[writing])
    assert processes.run(command).strip() == "closed"
    assert os.read(reading, 1) == b"x"
    for number in (reading, writing, other, another):
        os.close(number)


def test_an_ended_process_that_nobody_collected_does_not_count_as_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.alive(child.pid)
    child.wait()
    assert not processes.alive(child.pid)
    assert processes.born(child.pid) is None


@pytest.mark.parametrize(
    ("owner", "mode", "may"),
    [("user", 0o700, True), ("user", 0o077, False), ("other", 0o701, True), ("other", 0o770, False)],
)
def test_a_user_reaches_a_folder_when_every_one_above_lets_him_pass(tmp_path, owner, mode, may):
    # The folder belongs to this process; the user is either the same or somebody who owns nothing.
    uid = os.geteuid() if owner == "user" else 54321
    user = User(name="x", uid=uid, gid=54321)
    top = Path("/tmp") / f"moerge-reach-{os.getpid()}"
    (top / "below").mkdir(parents=True)
    try:
        top.chmod(0o755)
        (top / "below").chmod(mode)
        assert processes.reachable(top, user=user)
        assert processes.reachable(top / "below", user=user) is may
        top.chmod(0o700 if owner == "other" else 0o755)
        assert processes.reachable(top / "below", user=user) is (may and owner == "user")
    finally:
        top.chmod(0o700)
        (top / "below").chmod(0o700)
        (top / "below").rmdir()
        top.rmdir()


def test_free_ports_lie_below_those_that_the_kernel_lends():
    port = processes.free_port()
    assert 15_000 <= port < 32_000
    assert processes.is_free(port)


def test_without_any_redis_the_ways_out_are_named(monkeypatch):
    monkeypatch.setattr(redis.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LocalError, match=r"(?s)redis-server.*BROKER_URL"):
        redis.find_program()


def test_a_valkey_server_on_path_serves_where_the_wheel_is_absent(monkeypatch, tmp_path):
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(redis.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis.find_program() == program
