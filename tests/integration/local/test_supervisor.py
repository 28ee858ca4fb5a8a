"""The supervisor over small real processes: restarts, order of stopping, and what is left after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from local import homes, processes, supervisor
from local.homes import Home
from local.install import ROOT

# Each part notes its start and its stop, so that the order can be read. The grandchild stands for what parts start.
SCRIPT = """
import os, sys
from functools import partial
from pathlib import Path
from local import homes
from local.processes import Command
from local.supervisor import Part, Supervisor

home = homes.make(Path(sys.argv[1]))
NOTE = '''
import os, signal, subprocess, sys, time
notes, name = sys.argv[1:]
def note(what):
    with open(notes, "a") as out:
        out.write(what + " " + name + chr(10))
def stop(*_):
    note("stop")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if name == "stubborn" else stop)
grandchild = subprocess.Popen(["sleep", "600"])
note("start")
while True:
    time.sleep(0.05)
'''
watch = Supervisor(home=home, facts={"url": "here"})
watch.listen()
for name in sys.argv[2:]:
    command = Command([sys.executable, "-c", NOTE, str(home.folder / "notes"), name], os.environ, Path("/"))
    watch.add(Part(name, lambda command=command: command, stop_seconds=1.0, is_server=name == "database"))
watch.state = "ready"
watch.tell()
while not watch.stopping:
    watch.turn(5.0)
watch.stop()
"""


class Watched:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.home = homes.make(folder)
        self.child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), *names], cwd=ROOT)
        until(lambda: homes.read(self.home.run_file).get("state") == "ready")
        until(lambda: len(self.notes) == len(names))

    @property
    def pids(self) -> dict[str, int]:
        return homes.read(self.home.run_file)["processes"]

    @property
    def notes(self) -> list[str]:
        path = self.home.folder / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.child.pid).children(recursive=True)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def watched(tmp_path):
    made = []

    def make(*names: str) -> Watched:
        made.append(Watched(tmp_path / "home", *names))
        return made[-1]

    yield make
    for each in made:
        each.child.kill()
        each.child.wait()
        supervisor.recover(each.home, seconds=0.5)


def test_a_killed_part_is_started_again_and_what_it_had_started_is_ended(watched):
    watch = watched("one", "two")
    before = watch.pids
    grandchild = psutil.Process(before["one"]).children()[0]
    os.kill(before["one"], signal.SIGKILL)
    until(lambda: watch.pids.get("one", before["one"]) != before["one"])
    after = watch.pids
    assert processes.alive(after["one"])
    assert after["two"] == before["two"]
    assert not processes.alive(grandchild.pid)
    assert watch.home.run_file.stat().st_mode & 0o777 == 0o600


def test_a_part_that_dies_again_and_again_is_started_ever_more_slowly_but_never_given_up(watched, capfd):
    watch = watched("one")
    for _ in range(4):
        pid = watch.pids["one"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: watch.pids.get("one", pid) != pid)
    assert re.findall(r"one ended with -9; it starts again in ([0-9.]+) s", capfd.readouterr().err) == [
        "0.25",
        "0.50",
        "1.00",
        "2.00",
    ]


def test_a_stop_ends_the_servers_last_and_leaves_no_process(watched):
    watch = watched("database", "web", "beat")
    family = watch.family()
    assert len(family) == 6
    watch.child.send_signal(signal.SIGTERM)
    assert watch.child.wait(20) == 0
    assert sorted(watch.notes[3:5]) == ["stop beat", "stop web"]
    assert watch.notes[5:] == ["stop database"]
    assert not [process for process in family if processes.alive(process.pid)]


def test_a_part_that_ignores_the_polite_signal_is_killed_with_all_it_started(watched):
    watch = watched("stubborn", "web")
    family = watch.family()
    watch.child.send_signal(signal.SIGINT)
    assert watch.child.wait(20) == 0
    assert watch.notes[2:] == ["stop web"]
    assert not [process for process in family if processes.alive(process.pid)]


def test_parts_are_told_to_end_when_the_supervisor_is_killed(watched):
    watch = watched("one", "two")
    pids = watch.pids.values()
    watch.child.kill()
    watch.child.wait()
    until(lambda: not any(processes.alive(pid) for pid in pids))
    assert sorted(watch.notes[2:]) == ["stop one", "stop two"]


def test_the_next_start_ends_what_a_killed_supervisor_left_and_nothing_else(watched):
    watch = watched("stubborn", "two")
    family = watch.family()
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    # A number that was given to another process since: the time of its birth does not fit.
    children = homes.read(watch.home.children_file)
    children["web"] = {"pid": bystander.pid, "born": 1.0}
    watch.child.kill()
    watch.child.wait()
    homes.write_private(watch.home.children_file, children)
    assert any(processes.alive(process.pid) for process in family)
    try:
        supervisor.recover(watch.home, seconds=0.5)
        until(lambda: not any(processes.alive(process.pid) for process in family))
        assert bystander.poll() is None
        assert not watch.home.children_file.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_a_home_is_held_by_one_supervisor_at_a_time(tmp_path):
    home = homes.make(tmp_path)
    take = "import sys; from pathlib import Path; from local import homes; homes.take(homes.Home(Path(sys.argv[1])));"
    first = subprocess.Popen(
        [sys.executable, "-c", take + "print(1, flush=True); sys.stdin.read()", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert homes.holder(home) is None or first.poll() is None
    first.stdout.readline()
    assert homes.holder(home) == first.pid
    with pytest.raises(processes.LocalError, match="runs already"):
        homes.take(home)
    first.communicate(b"")
    assert homes.holder(home) is None


def test_an_answer_of_nobody_is_no_answer_and_a_refusal_is_read(tmp_path):
    assert supervisor.ask(f"http://127.0.0.1:{processes.free_port()}/readyz") == (0, {})
    body = json.dumps({"parts": {"web": {"state": "ready"}, "router": {"state": "starting", "reason": "it loads"}}})
    server = (
        "import sys\nfrom http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        " def do_GET(self):\n"
        f"  self.send_response(503); self.end_headers(); self.wfile.write({body.encode()!r})\n"
        "s = HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.handle_request()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    status, answer = supervisor.ask(f"http://127.0.0.1:{int(child.stdout.readline())}/readyz")
    child.communicate()
    assert status == 503
    assert list(supervisor.unready(answer)) == [("router", "it loads")]
    assert Home(tmp_path).log("web") == tmp_path / "logs" / "web.log"
