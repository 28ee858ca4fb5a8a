"""Accuracy after compression, on experts trained for the purpose: presets and densities, row by row, over seeds.

Data is a folder with banking77, clinc150 and sst2 as CSV files (columns text and label), NAME_train.csv and
NAME_test.csv. Everything runs on one thread; with `--work` a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import importlib
import tempfile
from pathlib import Path
from typing import Any

NAME = "compeft-quality"
SUMMARY = "Accuracy of compressed experts: LoRA, IA3, full fine-tunes, demo experts and their merges"

TASKS = ("banking77", "clinc150", "sst2")
TRAINED = ("lora", "ia3", "full")
KINDS = (*TRAINED, "demo", "merge")
DENSITIES = (0.05, 0.1, 0.2, 0.5)
EXAMPLES = Path(__file__).parent.parent / "examples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder with the CSV files")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep trained experts and outcomes here, and go on")
    parser.add_argument("--kinds", type=several(KINDS), default=KINDS, help=f"of {','.join(KINDS)} (default: all)")
    parser.add_argument("--tasks", type=several(TASKS), default=TASKS, help=f"of {','.join(TASKS)} (default: all)")
    parser.add_argument(
        "--densities", type=shares, default=DENSITIES, help="shares of values kept (default: 0.05,0.1,0.2,0.5)"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="trainings of each (default: 3)")
    parser.add_argument("--rows", type=positive, help="rows of a training (default: 6400, 7500, 3200)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables here, in Markdown")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what is not there yet, measure; returns the rows of the report."""
    # Seconds and half a gigabyte that `bin/bench --list` need not pay for.
    torch = importlib.import_module("torch")
    laboratory = importlib.import_module("benchmarks.quality.laboratory")
    encoder, tasks, demos, results = (
        importlib.import_module(f"benchmarks.quality.{name}") for name in ("encoder", "tasks", "demos", "results")
    )
    torch.set_num_threads(1)
    kinds = [kind for kind in TRAINED if kind in arguments.kinds]
    # Read first: a missing file should be known before an hour of training.
    read = [tasks.read(arguments.data, name) for name in arguments.tasks] if kinds else []
    experts = demos.read(arguments.data, EXAMPLES) if {"demo", "merge"} & set(arguments.kinds) else []
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here = laboratory.Laboratory(encoder.load_base(), work, arguments.densities)
        found = here.experts(kinds, read, seeds=range(1, arguments.seeds + 1), rows=arguments.rows)
        if "demo" in arguments.kinds:
            found += here.demos(experts)
        if "merge" in arguments.kinds:
            found += here.merges(experts)
    if arguments.table:
        arguments.table.write_text(results.markdown(found), encoding="utf-8")
    rows: list[dict[str, Any]] = results.rows(found)
    return rows


def several(choices: tuple[str, ...]) -> Any:
    """A parser of comma-separated choices."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return found

    return parse


def shares(text: str) -> tuple[float, ...]:
    """Comma-separated numbers above 0 and below 1."""
    found = tuple(float(part) for part in text.split(","))
    for value in found:
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
