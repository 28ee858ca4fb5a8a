"""Compress an adapter as large as rank 64 on a 65 B model, in a process of its own; watch its memory and progress.

Run by `bin/bench codec --large`; prints one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moerge.compression import compress_adapter, decompress, verify
from moerge.tensors import files
from moerge.tensors.files import Streamed

RANK, WIDTH, INNER, LAYERS = 64, 8192, 22016, 80
SIDES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, INNER), "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}  # fmt: skip
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": "large/base-65b"}


def make(path: Path, layers: int) -> None:
    """Gaussian factors in bfloat16, written one at a time."""
    tensors: dict[str, files.Tensor] = {}
    for layer in range(layers):
        for module, (width, height) in SIDES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = noise((RANK, width), 0.02, len(tensors))
            tensors[f"{name}.lora_B.weight"] = noise((height, RANK), 0.005, len(tensors))
    files.write(path, tensors)


def noise(shape: tuple[int, int], sigma: float, seed: int) -> Streamed:
    def blocks() -> Iterator[bytes]:
        values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(sigma)
        yield files.to_bf16(values).tobytes()

    return Streamed("BF16", shape, blocks)


class Watch:
    """The longest silence between two calls."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()

    def __call__(self, _share: float) -> None:
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of CPU, and how far the peak of resident memory rose above where it began."""
    before, started = memory("VmRSS"), time.process_time()
    work()
    return {"cpu_s": time.process_time() - started, "growth_bytes": max(0, memory("VmHWM") - before)}


def memory(field: str) -> int:
    """Resident bytes of this process, now or at their peak. What getrusage tells begins with the peak of the parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=("make", "compress", "verify", "decompress"))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    source, out = arguments.folder / "adapter_model.safetensors", arguments.folder / "adapter.compeft"
    found: dict[str, float] = {}
    if arguments.step == "make":
        make(source, arguments.layers)
        found = {"bytes": source.stat().st_size}
    elif arguments.step == "compress":
        watch = Watch()
        config = json.dumps(CONFIG).encode()
        found = measured(lambda: compress_adapter(config, source, out, density=arguments.density, progress=watch))
        found |= {"longest_silence_s": watch.longest, "bytes": out.stat().st_size}
        found["largest_tensor_bytes"] = 4 * RANK * INNER
    elif arguments.step == "verify":
        found = measured(lambda: verify(out))
    else:
        found = measured(lambda: decompress(out, arguments.folder / "restored"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
