"""Runs the measurements of this folder: `bin/bench --list`, `bin/bench NAME [--json] [options]`.

A measurement is a file with NAME, SUMMARY, `add_arguments(parser)` and `run(arguments)`, which returns rows. It says
how far it has come on stderr. Exit 0 when measured, also when a target is missed; 1 when it could not be measured; 2
for wrong usage.
"""

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moerge.errors import MoergeError

ROOT = Path(__file__).parent.parent


def main(given: list[str] | None = None) -> int:
    benches = found()
    arguments = _parser(benches).parse_args(given)
    if arguments.list:
        for name, module in benches.items():
            print(f"{name:18} {module.SUMMARY}")
        return 0
    if arguments.bench is None:
        _parser(benches).print_usage(sys.stderr)
        return 2
    try:
        rows = benches[arguments.bench].run(arguments)
    except (MoergeError, OSError, ValueError) as error:
        print(f"{arguments.bench} could not be measured: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report(arguments, rows), ensure_ascii=False))
    else:
        print(table(rows))
    return 0


def found() -> dict[str, ModuleType]:
    """Every measurement of the folder by its NAME."""
    files = sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"benchmarks.{name}") for name in files if not name.startswith("_")]
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` prints."""
    parameters = {name: value for name, value in vars(arguments).items() if name not in ("bench", "json", "list")}
    return {
        "bench": arguments.bench,
        "commit": commit(),
        "machine": machine(),
        "parameters": {name: str(value) if isinstance(value, Path) else value for name, value in parameters.items()},
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for people: a line each, with the peer and the target where there is one."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = []
    for row in rows:
        line = f"{row['name']:{width}}  {_shown(row['value'])} {row['unit']}"
        if row["peer"]:
            line += f"   {row['peer']} {_shown(row['peer_value'])}"
            line += f" (x{row['ratio']:.3g})" if row["ratio"] is not None else ""
        if row["target"] is not None:
            line += f"   target {_shown(row['target'])}: {'met' if row['met'] else 'MISSED'}"
        lines.append(line)
    return "\n".join(lines)


def commit() -> str | None:
    """The commit that was measured, with a mark when the files differ from it; None outside a checkout."""
    try:
        told = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("+changes" if told[1] else "")


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _parser(benches: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bin/bench", description="Measure how fast, small and good Moerge is.")
    parser.add_argument("--list", action="store_true", help="name the measurements")
    choices = parser.add_subparsers(dest="bench", metavar="NAME")
    for name, module in benches.items():
        one = choices.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        module.add_arguments(one)
    return parser


if __name__ == "__main__":
    sys.exit(main())
