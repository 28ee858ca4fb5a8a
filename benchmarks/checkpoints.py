"""Merges of whole checkpoints beside mergekit's own, on the same files in the same run.

Every merge is a process of its own with one thread; what it takes to load the libraries does not count as time. The
peer stands in an environment of its own, which is made on first use. Memory is the largest a process ever held, with
its libraries. Where the formula is compared, float64 arithmetic written here decides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moerge.merging import documents, full_checkpoints, recipe
from moerge.tensors import checkpoints, files
from moerge.tensors.bases import BaseWeights

ROOT = Path(__file__).parent.parent
PEER = "mergekit 0.1.5"
PACKAGES = ("mergekit==0.1.5", "torch==2.13.0")
# Vocabulary, width, inner width, layers and experts at which the targets hold: 54.9 million parameters each.
TARGET_SHAPE = (32_000, 512, 1_376, 7, 8)
SMALL_SHAPE = (512, 64, 172, 2, 8)
DENSITY = 0.2
METHODS = ("linear", "ties", "dare_ties")
FASTER = {"linear": 1.0, "ties": 5.0}
SMALLER = 4.0

# Loads libraries, then does the work, and writes what the work took: seconds of the clock and of the CPU; and the
# largest memory, that of the libraries with it.
_MEASURED = """
import atexit, json, pathlib, sys, time
path, load, work = sys.argv[1:4]
exec(load)
start = time.perf_counter(), time.process_time()
def report():
    took = time.perf_counter() - start[0], time.process_time() - start[1]
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    pathlib.Path(path).write_text(json.dumps({"wall": took[0], "cpu": took[1], "bytes": peak}))
atexit.register(report)
exec(work)
"""
_LOAD_OURS = """
from benchmarks.checkpoints import merge_ours
from moerge.merging import compiled
compiled.kernels(0, wanted=True)
"""
_LOAD_PEER = "from mergekit.scripts.run_yaml import main"


@dataclass(frozen=True)
class Taken:
    """What a merge took: seconds of the clock and of the CPU, and bytes at the most."""

    wall: float
    cpu: float
    bytes: int


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--layers", type=int, default=TARGET_SHAPE[3], help="layers of each checkpoint (default and targets: 7)"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=TARGET_SHAPE[0], help="rows of the embeddings (default and targets: 32000)"
    )
    parser.add_argument(
        "--checkpoint-repeats", type=int, default=1, help="times each merge is run; the fastest counts (default: 1)"
    )
    parser.add_argument(
        "--peer-environment",
        type=Path,
        default=Path.home() / ".cache" / "moerge-bench" / "mergekit-0.1.5",
        help="where mergekit is, or is installed to on first use (1 GB)",
    )


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report."""
    shape = (arguments.vocabulary, *TARGET_SHAPE[1:3], arguments.layers, TARGET_SHAPE[4])
    if min(*shape, arguments.checkpoint_repeats) < 1:
        raise ValueError("wanted sizes of at least 1")
    peer = None if arguments.no_peer else environment(arguments.peer_environment)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        say(f"{shape[4]} checkpoints of {parameters(shape) / 1e6:.1f} million parameters, bfloat16")
        build(folder / "large", shape)
        for method in METHODS:
            write_recipe(folder / "large", method, shape[4])
            say(f"{method}: Moerge")
            ours = fastest(arguments.checkpoint_repeats, folder / "large", method)
            if peer:
                say(f"{method}: {PEER}")
            theirs = fastest(arguments.checkpoint_repeats, folder / "large", method, peer=peer) if peer else None
            found += rows_of(method, ours, theirs, shape)
        build(folder / "small", SMALL_SHAPE)
        found += exactness(folder / "small", peer)
    return found


def rows_of(method: str, ours: Taken, peer: Taken | None, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time net of loading libraries and memory with them, with targets where the size is the one they hold at."""
    label = f"checkpoints, {method.replace('_', '-')}"
    theirs = (None, None, None) if peer is None else (peer.wall, peer.cpu, peer.bytes)
    found = [
        row(f"{label}: wall time net of imports", ours.wall, "s", theirs[0]),
        row(f"{label}: CPU time net of imports", ours.cpu, "s", theirs[1]),
        row(f"{label}: largest memory", ours.bytes, "bytes", theirs[2]),
    ]
    if peer is not None:
        is_target = tuple(shape) == TARGET_SHAPE and method in FASTER
        targets = (FASTER[method], SMALLER) if is_target else (None, None)
        found.append(times(f"{label}: faster than mergekit (CPU)", peer.cpu / ours.cpu, targets[0]))
        found.append(times(f"{label}: smaller than mergekit", peer.bytes / ours.bytes, targets[1]))
    return found


def exactness(folder: Path, peer: str | None) -> list[dict[str, Any]]:
    """How far TIES in bfloat16 files is from float64 arithmetic rounded once: ours, and the peer's."""
    write_recipe(folder, "ties", SMALL_SHAPE[4])
    measured(folder, "ties")
    wanted = ties_in_float64(folder, SMALL_SHAPE[4])
    ours, theirs = differences(folder / "ours-ties", wanted), (None, None)
    if peer:
        measured(folder, "ties", peer=peer)
        theirs = differences(folder / "peer-ties", wanted)
    return [
        row("checkpoints, ties: delta's distance from float64 arithmetic", ours[0], "share", theirs[0]),
        row("checkpoints, ties: values that differ from float64 arithmetic", ours[1], "share", theirs[1]),
    ]


def merge_ours(folder: str, method: str) -> None:
    """Carry out the recipe that mergekit is given too."""
    place = Path(folder)
    body = documents.read((place / f"{method}.yaml").read_bytes())
    body["output"] = {**body["output"], "kind": "full"}
    folders = {}
    for number, expert in enumerate(body["experts"]):
        # A hub knows the digests of what it stores.
        expert |= {"revision": "main", "digest": f"{number:064}"}
        folders[expert["digest"]] = expert["expert"]
    base = None if body.get("base_model") is None else BaseWeights(body["base_model"])
    full_checkpoints.merge(recipe.parse(body), folders, place / f"ours-{method}", base=base)


def write_recipe(folder: Path, method: str, count: int) -> None:
    """mergekit's YAML for one method, all experts alike."""
    density = {} if method == "linear" else {"density": DENSITY}
    document = {
        "merge_method": method,
        **({} if method == "linear" else {"base_model": str(folder / "base")}),
        "models": [
            {"model": str(folder / f"expert-{number}"), "parameters": {"weight": 1 / count, **density}}
            for number in range(count)
        ],
        "dtype": "bfloat16",
    }
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(document))


def tensors_of(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    vocabulary, width, inner, layers, _ = shape
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    found["lm_head.weight"] = (vocabulary, width)
    for layer in range(layers):
        here = f"model.layers.{layer}"
        found |= {f"{here}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{here}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{here}.mlp.down_proj.weight": (width, inner)}
        found |= {f"{here}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return found


def parameters(shape: tuple[int, ...]) -> int:
    return sum(int(np.prod(size)) for size in tensors_of(shape).values())


def build(folder: Path, shape: tuple[int, ...]) -> None:
    """A base and experts that differ from it by heavy-tailed deltas with a part in common."""
    folder.mkdir()
    sizes = tensors_of(shape)
    base = {name: _values(0, name, size) * np.float32(0.02) for name, size in sizes.items()}
    base = {name: files.from_bf16(files.to_bf16(values)) for name, values in base.items()}
    for number in range(-1, shape[4]):
        place = folder / ("base" if number < 0 else f"expert-{number}")
        place.mkdir()
        changed = (
            base if number < 0 else {name: values + _delta(number, name, values.shape) for name, values in base.items()}
        )
        tensors = {name: files.BF16(files.to_bf16(values)) for name, values in changed.items()}
        files.write(place / "model.safetensors", tensors, {"format": "pt"})
        (place / "config.json").write_text(json.dumps(_config(shape)))


def _values(seed: int, name: str, size: tuple[int, ...]) -> Any:
    key = [seed, *name.encode()]
    return np.random.default_rng(key).standard_normal(size, dtype=np.float32)


def _delta(number: int, name: str, size: tuple[int, ...]) -> Any:
    """A quotient of normal values has heavy tails."""
    common, own = _values(1, name, size), _values(2 + 2 * number, name, size)
    return np.float32(1e-3) * (common + own) / np.maximum(np.float32(0.2), np.abs(_values(3 + 2 * number, name, size)))


def _config(shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape[1],
        "intermediate_size": shape[2],
        "num_hidden_layers": shape[3],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": shape[0],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def ties_in_float64(folder: Path, count: int) -> dict[str, Any]:
    """Base plus TIES of equal weights, in float64: by sorting, and none of the library's arithmetic."""
    found = {}
    with checkpoints.open_checkpoint(folder / "base") as base:
        for name in base.names:
            own = base.float32(name).astype(np.float64)
            trimmed = []
            for number in range(count):
                with checkpoints.open_checkpoint(folder / f"expert-{number}") as expert:
                    delta = (expert.float32(name).astype(np.float64) - own).ravel()
                order = np.argsort(-np.abs(delta), kind="stable")
                delta[order[max(1, int(DENSITY * delta.size + 1e-9)) :]] = 0
                trimmed.append(delta)
            values = np.stack(trimmed)
            agree = np.sign(values) == np.where(values.sum(axis=0) >= 0, 1, -1)
            merged = (values * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
            found[name] = (own, own + merged.reshape(own.shape))
    return found


def differences(folder: Path, wanted: dict[str, Any]) -> tuple[float, float]:
    """Frobenius norm of the deltas' difference over the delta's, and the share of bfloat16 values that differ."""
    error = whole = differ = count = 0.0
    with checkpoints.open_checkpoint(folder) as merged:
        for name, (base, exact) in wanted.items():
            met, rounded = merged.float32(name), files.from_bf16(files.to_bf16(exact.astype(np.float32)))
            error += float(np.square(met.astype(np.float64) - rounded).sum())
            whole += float(np.square(rounded - base).sum())
            differ += int(np.count_nonzero(met != rounded))
            count += met.size
    return (error / whole) ** 0.5, differ / count


def environment(folder: Path) -> str:
    """The Python of an environment with the peer, made where there is none."""
    python = folder / "bin" / "python"
    marker = folder / "installed"
    if not marker.is_file():
        say(f"installing {PEER} to {folder}")
        venv.create(folder, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], {})
        marker.write_text("\n".join(PACKAGES) + "\n")
    return str(python)


def fastest(repeats: int, folder: Path, method: str, *, peer: str | None = None) -> Taken:
    """The run that took the least CPU time."""
    return min((measured(folder, method, peer=peer) for _ in range(repeats)), key=lambda taken: taken.cpu)


def measured(folder: Path, method: str, *, peer: str | None = None) -> Taken:
    """Carry out a recipe in a fresh process with one thread: ours, or by the peer's Python."""
    load, work = _LOAD_OURS, f"merge_ours({str(folder)!r}, {method!r})"
    if peer:
        options = ["--no-write-model-card", "--no-copy-tokenizer"]
        given = ["mergekit-yaml", str(folder / f"{method}.yaml"), str(folder / f"peer-{method}"), *options]
        load, work = _LOAD_PEER, f"sys.argv = {given!r}; main()"
    report = folder / "report.json"
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    one = dict.fromkeys(names, "1")
    _run([peer or sys.executable, "-c", _MEASURED, str(report), load, work], {**one, "HF_HUB_OFFLINE": "1"})
    return Taken(**json.loads(report.read_text()))


def _run(command: list[str], more: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise ValueError(f"{Path(command[0]).name} ended with {done.returncode}: {last}")


def row(name: str, value: float, unit: str, peer_value: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 4) if unit != "bytes" else int(value),
        "unit": unit,
        "peer": None if peer_value is None else PEER,
        "peer_value": None if peer_value is None else round(peer_value, 4),
        "ratio": round(value / peer_value, 6) if peer_value else None,
        "target": None,
        "met": None,
    }


def times(name: str, value: float, target: float | None) -> dict[str, Any]:
    """A row whose value should reach its target."""
    return {**row(name, value, "times", None), "target": target, "met": None if target is None else value >= target}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """This measurement alone: `python -m benchmarks.checkpoints`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit out")
    add_arguments(parser)
    for found in rows(parser.parse_args()):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
