"""Time and memory of merges of LoRA experts, beside PEFT's own on the same adapters in the same run.

Each figure is taken in a process of its own with one thread: CPU seconds, the fastest of a few repeats, and the
largest memory beyond what the process held before. Libraries, numba among them, are loaded before the measurement.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from moerge import merging
from moerge.merging import arrays, compiled
from moerge.merging.engine import Settings
from moerge.merging.sources import Factors
from moerge.merging.statistics import Gram
from moerge.tensors.adapters import LowRank

NAME = "merge"
SUMMARY = "Merges of LoRA experts: CPU time and memory, beside PEFT's add_weighted_adapter"

# The size at which the targets hold.
TARGET_SIZE = (4096, 16, 8)
LOW_RANK = {"seconds": 0.05, "bytes": 40 << 20}
DENSE = {"seconds": 1.5, "bytes": 200 << 20}
TARGETS: dict[str, dict[str, float]] = {
    "linear, then SVD": {**LOW_RANK, "faster": 1000},
    "TIES, then SVD": {**DENSE, "faster": 20},
    "TIES compiled, then SVD": {**DENSE, "faster": 27},
    "DARE, then SVD": DENSE,
    "Iso-C, then SVD": LOW_RANK,
}
DENSITY = 0.2
PEERS = {"linear, then SVD": "svd", "TIES, then SVD": "ties_svd", "TIES compiled, then SVD": "ties_svd"}


@dataclass(frozen=True)
class Case:
    """One merge by the engine that serves; `compiled` asks for the compiled loops or forbids them."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    compiled: bool | None = None


_TIES = {"variant": "peft", "density": DENSITY}
METHODS = {
    "linear, then SVD": Case("linear"),
    "TIES, then SVD": Case("ties", _TIES, compiled=False),
    "TIES compiled, then SVD": Case("ties", _TIES, compiled=True),
    "DARE, then SVD": Case("dare", {"density": DENSITY}),
    "Iso-C, then SVD": Case("iso_c"),
}
# Leading eigenpairs of the Gram matrices that RegMean and MaTS are measured with, as sidecars keep them.
EIGENPAIRS = 128
# Measurements that are asked for by name, in files of their own with `add_arguments` and `rows`.
SECTIONS = {
    "checkpoints": ("benchmarks.checkpoints", "measure merges of whole checkpoints too, beside mergekit"),
    "hub": ("benchmarks.merge_hub", "measure merges on demand by a hub too"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side", type=int, default=1024, help="rows and columns of the layer (default: 1024; targets: 4096)"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of each expert and of the merge (default: 16)")
    parser.add_argument("--experts", type=int, default=8, help="number of experts (default: 8)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="times each merge is run; the fastest counts (default: 3)"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave PEFT out; at 4096 it takes a minute and 3 GB")
    parser.add_argument("--every-method", action="store_true", help="measure each method with its defaults too")
    for name, (module, help_) in SECTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_)
        if importlib.util.find_spec(module):
            importlib.import_module(module).add_arguments(parser.add_argument_group(name))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report."""
    if min(arguments.side, arguments.rank, arguments.experts, arguments.repeats) < 1:
        raise ValueError("wanted sizes of at least 1")
    size = (arguments.side, arguments.rank, arguments.experts)
    rows = []
    peers: dict[str, tuple[float, int]] = {}
    for name, case in METHODS.items():
        if case.compiled and compiled.kernels(0, wanted=True) is None:
            say(f"{name}: left out, numba is not installed")
            continue
        say(f"{name}: {arguments.experts} experts of rank {arguments.rank}, {arguments.side} x {arguments.side}")
        ours = apart(measure_ours, case, size, arguments.repeats)
        peer = None if arguments.no_peer else PEERS.get(name)
        if peer and peer not in peers:
            say(f"{name}: PEFT {peer}")
            peers[peer] = apart(measure_peft, peer, size, 1)
        rows += rows_of(name, ours, peers[peer] if peer else (None, None), size)
    if arguments.every_method:
        for name, spec in merging.catalogue().items():
            say(name)
            ours = apart(measure_ours, Case(name), size, arguments.repeats)
            rows += rows_of(name, ours, (None, None), size, targets=DENSE if spec.rank_rule == "dense" else LOW_RANK)
    for name, (module, _) in SECTIONS.items():
        if getattr(arguments, name):
            if not importlib.util.find_spec(module):
                raise ValueError(f"there is no {module.replace('.', '/')}.py")
            rows += importlib.import_module(module).rows(arguments)
    return rows


def rows_of(
    name: str,
    ours: tuple[float, int],
    peer: tuple[float | None, int | None],
    size: tuple[int, int, int],
    *,
    targets: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Seconds, bytes and how many times faster, with targets where the size is the one they hold at."""
    targets = (targets or TARGETS.get(name, {})) if size == TARGET_SIZE else {}
    label = f"PEFT {PEERS[name]}" if peer[0] is not None else None
    rows = [
        row(f"{name}: CPU time", ours[0], "s", peer=label, peer_value=peer[0], target=targets.get("seconds")),
        row(f"{name}: extra memory", ours[1], "bytes", peer=label, peer_value=peer[1], target=targets.get("bytes")),
    ]
    if peer[0] is not None:
        faster = peer[0] / ours[0]
        target = targets.get("faster")
        rows.append(
            {**row(f"{name}: faster than PEFT", faster, "times", target=target), "met": target and faster >= target}
        )
    return rows


def row(
    name: str,
    value: float,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    target: float | None = None,
) -> dict[str, Any]:
    """A row whose value should not exceed its target."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else round(peer_value, 4),
        "ratio": round(value / peer_value, 6) if peer_value else None,
        "target": target,
        "met": None if target is None else value <= target,
    }


def measure_ours(case: Case, size: tuple[int, int, int], repeats: int) -> tuple[float, int]:
    """Seconds and extra bytes of one merge by the engine that serves."""
    spec = merging.catalogue()[case.method]
    experts = [{"layers.0.layer": LowRank(A, B, scaling)} for A, B, scaling in factors(size)][: spec.most_experts]
    given: dict[str, Any] = {
        "weights": [1 / len(experts)] * len(experts),
        "parameters": case.parameters,
        "digests": [f"{number:04}" for number in range(len(experts))],
        "settings": Settings(compiled=case.compiled),
    }
    if spec.needs:
        given["statistics"] = [statistics(spec.needs, size[0], number) for number in range(len(experts))]

    def once() -> None:
        arrays.merge(case.method, experts, rank=size[1], **given)

    # The first merge of a process also looks for methods, BLAS and machine code.
    small = [{"layers.0.layer": LowRank(one.A[:, :8], one.B[:8], 1.0)} for expert in experts for one in expert.values()]
    few = [statistics(spec.needs, 8, number) for number in range(len(experts))]
    for settings in (given["settings"], Settings(compiled=case.compiled is not False)):
        arrays.merge(
            case.method,
            small,
            **given | {"settings": settings} | ({"statistics": few} if spec.needs else {}),
        )
    return measured(once, repeats)


def statistics(needs: tuple[str, ...], side: int, number: int) -> dict[str, dict[str, Any]]:
    """What an expert is known by for the methods of groups 2 and 3, in the form that sidecars keep."""
    rng = np.random.default_rng(number)
    pairs = min(EIGENPAIRS, max(1, side // 16))

    def positive(*shape: int) -> Any:
        return (rng.random(shape) + 0.1).astype(np.float32)

    kinds = {
        "fisher_diag": lambda: Factors(positive(side, 1), positive(1, side)),
        "gram_in": lambda: Gram(
            np.linalg.qr(rng.standard_normal((side, pairs)))[0].T.astype(np.float16), positive(pairs), positive(side)
        ),
        "loss": lambda: 1.0 + number,
        "coefficients": lambda: 0.3,
    }
    return {kind: {"*" if kind in ("loss", "coefficients") else "layers.0.layer": kinds[kind]()} for kind in needs}


def measure_peft(combination: str, size: tuple[int, int, int], repeats: int) -> tuple[float, int]:
    """Seconds and extra bytes of PEFT's add_weighted_adapter on the same factors."""
    # Ten seconds and half a gigabyte that only the peer's own process may pay for.
    import peft  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    torch.set_num_threads(1)
    side, rank, count = size
    model: Any = None
    for number, (A, B, scaling) in enumerate(factors(size)):
        config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["layer"])
        if model is None:
            model = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(side, side, bias=False)}), config, "e0")
        else:
            model.add_adapter(f"e{number}", config)
        layer = model.base_model.model["layer"]
        with torch.no_grad():
            layer.lora_A[f"e{number}"].weight.copy_(torch.from_numpy(A))
            layer.lora_B[f"e{number}"].weight.copy_(torch.from_numpy(B))
    names = [f"e{number}" for number in range(count)]
    options: dict[str, Any] = {"svd_rank": rank, "svd_full_matrices": False, "combination_type": combination}
    if combination != "svd":
        options["density"] = DENSITY

    def once() -> None:
        model.add_weighted_adapter(names, [1 / count] * count, "merged", **options)
        model.delete_adapter("merged")

    return measured(once, repeats)


def factors(size: tuple[int, int, int]) -> list[tuple[Any, Any, float]]:
    """Heavy-tailed experts with a part in common, (A, B, scaling) each."""
    side, rank, count = size
    rng = np.random.default_rng(0)
    common = rng.standard_t(3, size=(rank, side)), rng.standard_t(3, size=(side, rank))
    return [
        (
            (0.01 * (rng.standard_t(3, size=(rank, side)) + 0.5 * common[0])).astype(np.float32),
            (0.01 * (rng.standard_t(3, size=(side, rank)) + 0.5 * common[1])).astype(np.float32),
            1.0,
        )
        for _ in range(count)
    ]


def measured(work: Callable[[], None], repeats: int) -> tuple[float, int]:
    """CPU seconds of the fastest run, and the peak of memory beyond the start in the first."""
    before = reset_peak()
    seconds = []
    extra = 0
    with threadpoolctl.threadpool_limits(limits=1):
        for number in range(repeats):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
            if number == 0:
                extra = max(0, memory("VmHWM") - before)
    return min(seconds), extra


def reset_peak() -> int:
    """Memory held now, in bytes; the kernel's record of the largest starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def apart(work: Callable[..., tuple[float, int]], *arguments: Any) -> tuple[float, int]:
    """Run a measurement in a fresh process, so that no memory of another one is counted."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
