"""`bin/run`: start a hub on this machine in the foreground or beside the terminal, or stop it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from local import install

if TYPE_CHECKING:
    from local.hub import Options

DESCRIPTION = """Starts PostgreSQL, Redis, the web process, the router, the workers and the demo, and prints the URL.
The first start also makes the environment (.venv). Without --detach it stays in the foreground; Ctrl-C stops everything
in order. With --detach it returns when the hub is ready and prints one JSON object: url, home, username, password,
api_key, processes. The same stands in HOME/run.json.

DATABASE_URL and BROKER_URL name servers to be used instead of own ones."""
EXIT_FAILED = 1
DEFAULT_PORT = 8000
STOP_SECONDS = 120


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bin/run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--home", type=Path, metavar="DIR", help="where everything is kept (default: HUB_HOME or ./var)")
    made.add_argument("--port", type=_port, default=None, metavar="N", help="port of the site, 0: a free one (8000)")
    made.add_argument("--no-demo", action="store_true", help="do not upload the demo experts")
    made.add_argument("--routers", type=_count, default=1, metavar="N", help="router processes (1)")
    made.add_argument("--workers", type=_count, default=1, metavar="N", help="workers for heavy jobs (1)")
    made.add_argument("--timeout", type=_seconds, default=300.0, metavar="SECONDS", help="time to get ready (300)")
    way = made.add_mutually_exclusive_group()
    way.add_argument("--detach", action="store_true", help="return when ready, with one JSON object on stdout")
    way.add_argument("--stop", action="store_true", help="stop the hub of this home")
    return made


def _port(text: str) -> int:
    return _within(int(text), 0, 65535)


def _count(text: str) -> int:
    return _within(int(text), 1, 64)


def _within(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number}: wanted {least} to {most}")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: wanted a number of seconds above 0")
    return seconds


def main() -> None:
    wanted = parser().parse_args()
    install.enter("local.commands.run", sys.argv[1:], need="run")
    # What follows needs the installed packages.
    from local.processes import LocalError  # noqa: PLC0415

    try:
        if wanted.stop:
            _stop(wanted)
        elif wanted.detach:
            _detach(wanted)
        else:
            from local import hub  # noqa: PLC0415

            sys.exit(hub.serve(options_of(wanted)))
    except LocalError as error:
        sys.stderr.write(f"bin/run: {error}\n")
        sys.exit(EXIT_FAILED)


def _folder(wanted: argparse.Namespace) -> Path:
    from local import homes  # noqa: PLC0415

    return (wanted.home or homes.default_folder()).expanduser().resolve()


def options_of(wanted: argparse.Namespace) -> "Options":
    from local.hub import Options  # noqa: PLC0415

    return Options(
        home=_folder(wanted),
        port=DEFAULT_PORT if wanted.port is None else wanted.port,
        demo=not wanted.no_demo,
        routers=wanted.routers,
        workers=wanted.workers,
        timeout_seconds=wanted.timeout,
    )


def _detach(wanted: argparse.Namespace) -> None:
    """Start the supervisor in a session of its own and wait until it says that the hub is ready."""
    from local import homes  # noqa: PLC0415

    home = homes.make(_folder(wanted))
    if homes.holder(home) is not None:
        _report_running(homes.read(home.run_file), wanted)
        return
    log = home.log("supervisor")
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    with log.open("ab") as output:
        child = subprocess.Popen(
            [str(install.PYTHON), "-P", "-m", "local.commands.run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            record = homes.read(home.run_file)
            if record.get("supervisor") == child.pid and record.get("state") == "ready":
                _print(record)
                return
            time.sleep(0.1)
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        sys.exit(130)
    record = homes.read(home.run_file)
    reason = record.get("error") if record.get("supervisor") == child.pid else None
    sys.stderr.write(f"bin/run: {reason or _tail(log)}\n(log of the supervisor: {log})\n")
    sys.exit(EXIT_FAILED)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def _report_running(record: dict[str, Any], wanted: argparse.Namespace) -> None:
    """A hub of this home runs: say where, unless another port was asked for or it is not ready yet."""
    from local.processes import LocalError  # noqa: PLC0415

    url = str(record.get("url"))
    if wanted.port and not url.endswith(f":{wanted.port}"):
        raise LocalError(f"a hub of this home runs already at {url}; stop it first: bin/run --stop")
    if record.get("state") != "ready":
        raise LocalError(
            f"a hub of this home is {record.get('state')} already; waiting for {record.get('waiting_for')}"
        )
    _print(record)


def _print(record: dict[str, Any]) -> None:
    names = ("url", "home", "username", "password", "api_key", "processes", "supervisor")
    print(json.dumps({name: record[name] for name in names}), flush=True)


def _stop(wanted: argparse.Namespace) -> None:
    """Stop the hub of a home and whatever a killed supervisor left; nothing to stop is fine."""
    from local import homes, processes, supervisor  # noqa: PLC0415

    folder = _folder(wanted)
    if not folder.exists():
        sys.stderr.write(f"no hub in {folder}\n")
        return
    home = homes.make(folder)
    holder = homes.holder(home)
    if holder is None:
        supervisor.recover(home)
        home.run_file.unlink(missing_ok=True)
        sys.stderr.write(f"no hub runs in {folder}\n")
        return
    known = homes.read(home.run_file).get("processes", {})
    os.kill(holder, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while homes.holder(home) == holder:
        if time.monotonic() > deadline:
            _give_up(home.folder, holder)
        time.sleep(0.1)
    left = [name for name, pid in known.items() if processes.alive(pid)]
    if left:
        raise processes.LocalError(f"still running: {', '.join(left)}")
    sys.stderr.write(f"stopped the hub of {folder}\n")


def _give_up(folder: Path, supervisor_pid: int) -> NoReturn:
    from local.processes import LocalError  # noqa: PLC0415

    raise LocalError(f"the supervisor (process {supervisor_pid}) of {folder} did not stop within {STOP_SECONDS} s")


if __name__ == "__main__":
    main()
