"""From arguments to an exit status: parses, runs one command, prints its answer or its problem."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

import moerge
from moerge.cli import compress, decompress, eval_router, merge, problems, pull, route, train_gates, verify
from moerge.cli.terminal import Terminal
from moerge.errors import MoergeError

COMMANDS = (compress, decompress, verify, pull, merge, route, eval_router, train_gates)
EPILOG = """exit status:
  0  done
  1  refused: the problem, with its remedy, is on stderr
  2  wrong usage
  3  verification failed: bytes are not what they should be

environment:
  HF_ENDPOINT   address of the hub, as --endpoint
  HF_TOKEN      API key, as --token
  MOERGE_CACHE  folder where merge --local keeps what it has fetched"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        wanted = parser().parse_args(arguments)
    except SystemExit as end:
        # argparse has printed help or what is wrong.
        return end.code if isinstance(end.code, int) else 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show an arrow gets a question mark instead of a traceback.
            stream.reconfigure(errors="replace")
    terminal = Terminal(as_json=wanted.json, is_quiet=wanted.quiet)
    try:
        with terminal:
            wanted.run(wanted, terminal)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of stdout has gone, as `moerge ... | head` does; Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        terminal.say("Stopped.")
        return 130
    except (MoergeError, OSError, MemoryError) as error:
        problem = problems.of(error, command=wanted.command)
        terminal.refuse(problem)
        return problem.status
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    made = argparse.ArgumentParser(
        prog="moerge",
        description="Compress, merge and restore experts (PEFT adapters); find, fetch and verify them on a hub.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"moerge {moerge.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(added)
        _add_common(added)
        added.set_defaults(run=command.run)
    return made


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What every command takes, so that scripts can pass it without knowing which."""
    group = parser.add_argument_group("output and hub")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    group.add_argument("--quiet", "-q", action="store_true", help="print no progress and no remarks")
    group.add_argument("--endpoint", metavar="URL", help="address of the hub (default: HF_ENDPOINT)")
    group.add_argument("--token", metavar="KEY", help="API key of the hub (default: HF_TOKEN; public things need none)")
