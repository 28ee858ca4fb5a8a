"""What each task keeps when the demo experts are merged into one, method by method, at a few scales.

Data is the folder that the demo experts were trained from (see examples/experts.toml). Nothing is tuned: the table has
every scale that was tried, on the same rows. Everything runs on one thread.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from moerge import merging
from moerge.merging.base import Spec

NAME = "merge-quality"
SUMMARY = "Accuracy of merges of the demo experts, by merge method and scale"
EXAMPLES = Path(__file__).parent.parent / "examples"
SCALES = (0.15, 0.3, 0.6, 1.0)
# These need what demo experts do not have: a search, exactly two experts, a map of their layers, or equal ranks.
LEFT_OUT = {"slerp", "nuslerp", "layer_swapping", "lorahub"}
NEED_EQUAL_RANKS = "peft_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder with the CSV files")
    parser.add_argument("--rows", type=int, default=200, help="test rows of each task (default: 200; 0 for all)")
    parser.add_argument("--methods", help="only these, by comma (default: every method that needs the adapters alone)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Merge and measure; returns the rows of the report, in percent of test rows answered right."""
    # Seconds and half a gigabyte that `bin/bench --list` need not pay for.
    torch = importlib.import_module("torch")
    encoder, demos, merges = (
        importlib.import_module(f"benchmarks.quality.{name}") for name in ("encoder", "demos", "merges")
    )
    torch.set_num_threads(1)
    specs = chosen(arguments.methods)
    base = encoder.load_base()
    experts = [demo.first(arguments.rows) for demo in demos.read(arguments.data, EXAMPLES)]
    folders = [demo.folder for demo in experts]

    def measured(name: str, model: Any) -> list[float]:
        say(name)
        return [100 * demos.outcome(model, demo, base).accuracy for demo in experts]

    untouched = measured("base", base.model)
    alone = [
        100 * demos.outcome(merges.summed("linear", [folder], base, weight=1.0), demo, base).accuracy
        for folder, demo in zip(folders, experts, strict=True)
    ]
    rows = [row("base alone", untouched), row("each expert on its own task", alone)]
    for spec in specs:
        for scale in SCALES:
            values = measured(f"{spec.name}, scale {scale}", merges.scaled(spec.name, folders, base, scale=scale))
            rows.append(row(f"{spec.name}, scale {scale:g}", values, peer=mean(alone)))
    return rows


def chosen(names: str | None) -> list[Spec]:
    """The methods to measure. Raises ValueError for a name that is none."""
    catalogue = merging.catalogue()
    fitting = {
        name: spec
        for name, spec in catalogue.items()
        if not spec.needs and name not in LEFT_OUT and not name.startswith(NEED_EQUAL_RANKS)
    }
    wanted = names.split(",") if names else list(fitting)
    if unknown := sorted(set(wanted) - fitting.keys()):
        raise ValueError(f"{', '.join(unknown)}: wanted of {', '.join(fitting)}")
    return [fitting[name] for name in wanted]


def row(name: str, accuracies: list[float], *, peer: float | None = None) -> dict[str, Any]:
    """The mean over tasks, beside that of the experts on their own tasks; the worst task stands in the name."""
    value = mean(accuracies)
    return {
        "name": f"{name} (worst task {min(accuracies):.1f} %)",
        "value": round(value, 2),
        "unit": "%",
        "peer": None if peer is None else "experts alone",
        "peer_value": None if peer is None else round(peer, 2),
        "ratio": None if peer is None else round(value / peer, 4),
        "target": None,
        "met": None,
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
