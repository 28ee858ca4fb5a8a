"""ComPEFT as its authors released it (arXiv 2311.13171; github.com/prateeky2806/ComPEFT, get_compressed_lora_weights).

All tensors, sorted by name, are one vector: one threshold, one standard deviation. `int(n*k) + 1` values are kept, and
all that tie with the smallest of them. Where a factor of a LoRA pair is much smaller than the other, the threshold
erases it; the hub's own preset does not. Two deviations: a vector with fewer non-zero values than should be kept makes
the release fail and keeps its non-zero values here, and zeros are never kept (the release keeps them with sign 0, so
its output is the same).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moerge.compression import selection
from moerge.compression.planes import Positions
from moerge.compression.selection import Blocks
from moerge.errors import ParameterInvalid
from moerge.tensors.files import Float32

STC = "stc"
PRUNE = "prune"


@dataclass(frozen=True)
class Plan:
    """What the release computes over the whole vector.

    `scale` is alpha times the standard deviation (n - 1), or for STC the signed mean of the kept values; pruning keeps
    magnitudes and has none.
    """

    threshold: float
    sigma: float
    scale: float | None

    def keep(self, values: Float32) -> Positions:
        """Ascending flat indices of one tensor's kept values."""
        return selection.keep_from(values, self.threshold)


def plan(blocks: Blocks, *, density: float, mode: float | str) -> Plan:
    """Threshold and scale over the task vector that `blocks()` yields in pieces, any number of times.

    `mode` is the alpha of the paper, or STC, or PRUNE. `density` is k / 100, in (0, 1).
    """
    count, _, squares = selection.spread(blocks())
    if count == 0:
        return Plan(0.0, 0.0, 0.0)
    rank = count - int(count * density)
    if rank < 1:
        raise ParameterInvalid(
            "The published rule keeps everything unchanged at density 1; there is nothing ternary about it.",
            pointer="density", met=density, wanted="below 1", remedy="Choose a density below 1.",
        )  # fmt: skip
    threshold = selection.nth_smallest(blocks, rank)
    sigma = float(np.sqrt(squares / (count - 1))) if count > 1 else 0.0
    if mode == PRUNE:
        return Plan(threshold, sigma, None)
    if mode == STC:
        return Plan(threshold, sigma, _signed_mean(blocks, threshold))
    return Plan(threshold, sigma, float(mode) * sigma)


def _signed_mean(blocks: Blocks, threshold: float) -> float:
    total, count = 0.0, 0
    for block in blocks():
        kept = block.reshape(-1)[selection.keep_from(block, threshold)]
        total += float(kept.sum(dtype=np.float64))
        count += kept.size
    return total / count if count else 0.0


def compress(
    tensors: Mapping[str, Float32],
    *,
    density: float,
    mode: float | str,
    initial: Mapping[str, Float32] | float = 0.0,
) -> dict[str, Float32]:
    """The release's whole function: tensors in, tensors of initial value plus compressed difference out.

    `initial` is 0 for LoRA, 1 for IA3, the base model's tensors for full fine-tuning. At density 1 the input is
    returned unchanged, as k = 100 does.
    """
    if density == 1:
        return dict(tensors)

    def start(name: str) -> Float32:
        given = initial[name] if isinstance(initial, Mapping) else initial
        return np.asarray(given, np.float32)

    def blocks() -> Iterator[Float32]:
        for name in sorted(tensors):
            yield tensors[name] - start(name)

    decided = plan(blocks, density=density, mode=mode)
    out = {}
    for name in sorted(tensors):
        difference = tensors[name] - start(name)
        kept = decided.keep(difference)
        change = np.zeros(difference.size, np.float32)
        values = difference.reshape(-1)[kept]
        change[kept] = values if decided.scale is None else np.float32(decided.scale) * np.sign(values)
        out[name] = change.reshape(difference.shape) + start(name)
    return out
