"""Time and memory of merges of LoRA experts, beside PEFT's own on the same adapters in the same run.

Each figure is taken in a process of its own with one thread: CPU seconds, the fastest of a few repeats, and the
largest memory beyond what the process held before.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from moerge.merging import arrays
from moerge.tensors.adapters import LowRank

NAME = "merge"
SUMMARY = "Merges of LoRA experts: CPU time and memory, beside PEFT's add_weighted_adapter"

# The size at which the targets hold.
TARGET_SIZE = (4096, 16, 8)
TARGETS = {
    "linear, then SVD": {"seconds": 0.05, "bytes": 40 << 20, "faster": 1000},
    "TIES, then SVD": {"seconds": 1.5, "bytes": 200 << 20, "faster": 20},
}
DENSITY = 0.2
PEERS = {"linear, then SVD": "svd", "TIES, then SVD": "ties_svd"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear, then SVD": ("linear", {}),
    "TIES, then SVD": ("ties", {"variant": "peft", "density": DENSITY}),
    "DARE, then SVD": ("dare", {"density": DENSITY}),
    "Iso-C, then SVD": ("iso_c", {}),
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


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report."""
    if min(arguments.side, arguments.rank, arguments.experts, arguments.repeats) < 1:
        raise ValueError("wanted sizes of at least 1")
    size = (arguments.side, arguments.rank, arguments.experts)
    rows = []
    for name in METHODS:
        say(f"{name}: {arguments.experts} experts of rank {arguments.rank}, {arguments.side} x {arguments.side}")
        seconds, extra = apart(measure_ours, name, size, arguments.repeats)
        peer_seconds, peer_extra = None, None
        if name in PEERS and not arguments.no_peer:
            say(f"{name}: PEFT {PEERS[name]}")
            peer_seconds, peer_extra = apart(measure_peft, PEERS[name], size, 1)
        rows += rows_of(name, (seconds, extra), (peer_seconds, peer_extra), size)
    return rows


def rows_of(
    name: str, ours: tuple[float, int], peer: tuple[float | None, int | None], size: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Seconds, bytes and how many times faster, with targets where the size is the one they hold at."""
    targets = TARGETS.get(name, {}) if size == TARGET_SIZE else {}
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


def measure_ours(name: str, size: tuple[int, int, int], repeats: int) -> tuple[float, int]:
    """Seconds and extra bytes of one merge by the engine that serves."""
    experts = [{"layer": LowRank(A, B, scaling)} for A, B, scaling in factors(size)]
    method, parameters = METHODS[name]
    digests = [f"{number:04}" for number in range(len(experts))]
    weights = [1 / len(experts)] * len(experts)

    def once() -> None:
        arrays.merge(method, experts, weights=weights, parameters=parameters, digests=digests, rank=size[1])

    # The first merge of a process also looks for methods and for BLAS.
    arrays.merge(method, [{"w": np.ones((2, 2), np.float32)}], parameters=parameters)
    return measured(once, repeats)


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
