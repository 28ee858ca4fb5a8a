"""Routing per token against its rivals: trains a tiny base and six experts from scratch and measures all methods.

    python examples/token_routing/run.py --out DIR             three seeds; about 10 minutes of one CPU core
    python examples/token_routing/run.py --out DIR --quick     a minute, to see that it runs; figures mean nothing
    python examples/token_routing/run.py --out DIR --only 2    one seed alone, for instance beside another process

Nothing is done twice: what lies in DIR from an earlier call is used. The results go to DIR/results.json and, as tables,
to DIR/results.md. It wants the library with torch, transformers, peft and the packaged encoder, and no network.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
# The library of this checkout, which need not be installed, and the files beside this one.
sys.path.insert(0, str(HERE.parents[1]))
from examples.token_routing import base, experts, methods, report, tasks  # noqa: E402
from examples.token_routing.base import Schedule  # noqa: E402

# The seeds of experts, gates and inputs share one base, as experts of a hub do.
BASE_SEED = 1
TOKEN_LEVEL = ("arrow", "phatgoose", "glider")


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured."""

    base: Schedule
    expert: Schedule
    gate_steps: int
    gate_lines: int
    test_items: int


FULL = Plan(
    base=Schedule(steps=800, batch=32, learning_rate=3e-3),
    expert=Schedule(steps=400, batch=16, learning_rate=5e-3, enough=0.02),
    gate_steps=100,
    gate_lines=800,
    test_items=200,
)
QUICK = Plan(
    base=Schedule(steps=20, batch=8, learning_rate=3e-3),
    expert=Schedule(steps=5, batch=8, learning_rate=4e-3),
    gate_steps=3,
    gate_lines=24,
    test_items=4,
)


def made(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, filled by `make` where it is not there; half a folder never bears the name."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        started = time.process_time()
        told = make(unfinished)
        unfinished.rename(folder)
        print(f"{folder}: {told}, {time.process_time() - started:.0f} s of CPU time", flush=True)
    return folder


def test_sets(seed: int, count: int) -> dict[str, list[tasks.Item]]:
    """The inputs that are measured, by name: one set for each expert's task, then the compositions."""
    found = {}
    for task in tasks.TASKS:
        chance = random.Random(experts.seed_of(f"test {task.name}", seed))
        found[task.name] = [tasks.single(task.name, chance, held_out=True) for _ in range(count)]
    for name in tasks.COMPOSITIONS:
        chance = random.Random(experts.seed_of(f"test {name}", seed))
        found[name] = [tasks.composed(name, chance, held_out=True) for _ in range(count)]
    return found


def trained(out: Path, plan: Plan, seed: int) -> methods.Place:
    """Base, experts and gates of a seed."""
    base_folder = made(out.parent / "base", lambda folder: base.train(folder, schedule=plan.base, seed=BASE_SEED))
    tokens = transformers.AutoTokenizer.from_pretrained(base_folder)
    found = {}
    for task in tasks.TASKS:
        found[task.name] = made(
            out / "experts" / task.name,
            lambda folder, task=task: experts.train(
                folder, tokens, task, base_folder=base_folder, schedule=plan.expert, seed=seed
            ),
        )
        if not (found[task.name] / experts.GATES).exists():
            experts.train_gates(
                found[task.name],
                task,
                base_folder=base_folder,
                data=out / "gate-data" / f"{task.name}.jsonl",
                steps=plan.gate_steps,
                lines=plan.gate_lines,
                seed=seed,
            )
    return methods.Place(base=base_folder, experts=found, tokens=tokens)


def rows(place: methods.Place, out: Path, retrieval: methods.Retrieval) -> dict[str, Callable[[], Any]]:
    """Each method by name, as something that makes a function from inputs to answers."""
    tokens = place.tokens

    def with_experts(choose: Callable[[Sequence[tasks.Item]], list[str]]) -> Any:
        model = methods.together(place)
        return lambda items: methods.answers(model, tokens, items, adapter_names=choose(items))

    def merged(method: str, **parameters: Any) -> Any:
        folder = made(out / method, lambda folder: methods.merged(place, method, parameters, folder))
        model = methods.with_adapter(place, folder)
        return lambda items: methods.answers(model, tokens, items)

    def routed(strategy: str, **settings: Any) -> Any:
        model = methods.routed(place, strategy, **settings)

        def answer(items: Sequence[tasks.Item]) -> methods.Answers:
            if strategy == "glider":
                model.set_scores(retrieval.cosines(items))
            return methods.answers(model, tokens, items)

        return answer

    def plain() -> Any:
        model = base.load(place.base)
        return lambda items: methods.answers(model, tokens, items)

    def oracle() -> Any:
        model = methods.together(place)
        return lambda items: methods.oracle(model, tokens, items)

    return {
        "base": plain,
        "expert alone": lambda: with_experts(lambda items: [item.tasks[0] for item in items]),
        "average": lambda: merged("linear", normalize=True),
        "TIES": lambda: merged("ties"),
        "retrieval, top 1": lambda: with_experts(retrieval.best),
        "SMEAR": lambda: routed("smear"),
        "Arrow": lambda: routed("arrow"),
        "PHATGOOSE": lambda: routed("phatgoose"),
        "GLIDER": lambda: routed("glider"),
        "Arrow, top 1": lambda: routed("arrow", top_k=1),
        "PHATGOOSE, top 1": lambda: routed("phatgoose", top_k=1),
        "GLIDER, top 1": lambda: routed("glider", top_k=1),
        "GLIDER, alpha 100": lambda: routed("glider", alpha=100.0),
        "oracle": oracle,
    }


def measured(out: Path, place: methods.Place, plan: Plan, seed: int) -> dict[str, Any]:
    """Every method on every set, and who is used where, of one seed."""
    sets = test_sets(seed, plan.test_items)
    retrieval = methods.Retrieval()
    found: dict[str, Any] = {"rows": {}}
    for row, prepare in rows(place, out, retrieval).items():
        found["rows"][row] = kept(out / "rows" / f"{row}.json", partial(_row, row, prepare, sets))
    found["retrieved"] = kept(out / "rows" / "retrieved right.json", partial(_retrieved, retrieval, sets))
    for strategy in TOKEN_LEVEL:
        path = out / "rows" / f"use of {strategy}.json"
        found[f"use of {strategy}"] = kept(path, partial(_use, strategy, place, sets, retrieval))
    return found


def _row(row: str, prepare: Callable[[], Any], sets: dict[str, list[tasks.Item]]) -> dict[str, Any]:
    answer = prepare()
    # No expert alone stands for two tasks.
    wanted = {name: items for name, items in sets.items() if row != "expert alone" or name not in tasks.COMPOSITIONS}
    return {name: tasks.scored(items, methods.batched(items, answer)) for name, items in wanted.items()}


def _retrieved(retrieval: methods.Retrieval, sets: dict[str, list[tasks.Item]]) -> dict[str, float]:
    """For each set the share of inputs for which the expert put first is one that is needed."""
    return {
        name: sum(best in item.tasks for best, item in zip(retrieval.best(items), items, strict=True)) / len(items)
        for name, items in sets.items()
    }


def _use(
    strategy: str, place: methods.Place, sets: dict[str, list[tasks.Item]], retrieval: methods.Retrieval
) -> dict[str, Any]:
    """Who is used: the share of the right expert on every set, and by half where a set has halves."""
    model = methods.routed(place, strategy)
    told: dict[str, Any] = {"right": {}, "halves": {}}
    for name, items in sets.items():
        few = items[: methods.BATCH]
        if strategy == "glider":
            model.set_scores(retrieval.cosines(few))
        weights = methods.watched(model, place.tokens, few)
        told["right"][name] = methods.right_share(weights, model.experts, few)
        if tasks.COMPOSITIONS.get(name):
            told["halves"][name] = methods.use_by_half(weights, model.experts, few)
    return told


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """What a file tells, after computing it where the file is not there."""
    if not path.exists():
        started = time.process_time()
        values = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(values, indent=1), encoding="utf-8")
        unfinished.rename(path)
        print(f"{path}: {time.process_time() - started:.0f} s of CPU time", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where all that is made goes")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--only", type=int, metavar="SEED", help="train and measure this seed alone")
    parser.add_argument("--quick", action="store_true", help="next to no training, to see that everything runs")
    wanted = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    transformers.utils.logging.disable_progress_bar()
    plan = QUICK if wanted.quick else FULL
    # A folder of one plan is never taken up by another.
    kept_plan = kept(wanted.out / "plan.json", lambda: asdict(plan))
    if kept_plan != asdict(plan):
        print(f"{wanted.out} holds another plan than this; give another --out.", file=sys.stderr)
        return 2
    found = {}
    for seed in [wanted.only] if wanted.only is not None else range(1, wanted.seeds + 1):
        out = wanted.out / f"seed-{seed}"
        found[str(seed)] = measured(out, trained(out, plan, seed), plan, seed)
    (wanted.out / "results.json").write_text(
        json.dumps({"plan": kept_plan, "seeds": found}, indent=1), encoding="utf-8"
    )
    text = report.tables(found)
    (wanted.out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
