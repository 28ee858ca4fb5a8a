"""Which values are kept, which tensors are made ternary, and at which density."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moerge.compression.planes import Positions
from moerge.tensors.files import Float32

# Below this, a tensor's scale and manifest row cost more than its values are worth.
SMALLEST = 1024
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?")

_HALF, _LOW = np.uint32(16), np.uint32(0xFFFF)

UInt32 = npt.NDArray[np.uint32]
Blocks = Callable[[], Iterable[Float32]]


def density_for(base_parameters: int | None) -> float:
    """The default density for a base model of so many parameters: the larger the base, the fewer values suffice."""
    if base_parameters is None or base_parameters < 10**9:
        return 0.2
    return 0.1 if base_parameters < 13 * 10**9 else 0.05


def factors(names: Iterable[str]) -> dict[str, str | None]:
    """The LoRA factors among tensor names, each with the name of its partner (A of B, B of A) or None."""
    found = {name: match for name in names if (match := _FACTOR.fullmatch(name))}
    partners: dict[str, str | None] = {}
    for name, match in found.items():
        other = "B" if match["side"] == "A" else "A"
        partner = f"{match['module']}.lora_{match['embedding'] or ''}{other}{match['weight'] or ''}"
        partners[name] = partner if partner in found else None
    return partners


def is_first(name: str) -> bool:
    """Whether a LoRA factor is A (rank x in) rather than B (out x rank)."""
    match = _FACTOR.fullmatch(name)
    return match is not None and match["side"] == "A"


def module_of(name: str) -> str:
    """The module a LoRA factor belongs to; another tensor's own name."""
    match = _FACTOR.fullmatch(name)
    return match["module"] if match else name


def count_for(size: int, density: float) -> int:
    """How many of `size` values are kept: the nearest number, halves upwards, at least one."""
    return min(size, max(1, int(np.floor(size * density + 0.5))))


def keep_largest(values: Float32, density: float) -> Positions:
    """Ascending flat indices of the `max(1, floor(n * density + 0.5))` largest magnitudes.

    Exactly that many, ties going to the lower index (bfloat16 values tie often: keeping all of them keeps up to 7 %
    too many), but never a zero, so fewer may remain.
    """
    flat = np.abs(values.reshape(-1))
    if flat.size == 0:
        return np.empty(0, np.int64)
    count = count_for(flat.size, density)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    if threshold == 0:
        return np.flatnonzero(flat > 0)
    above = flat > threshold
    ties = np.flatnonzero(flat == threshold)[: count - int(np.count_nonzero(above))]
    above[ties] = True
    return np.flatnonzero(above)


def keep_from(values: Float32, threshold: float) -> Positions:
    """Ascending flat indices of the values whose magnitude is at least `threshold`, zeros never: all ties."""
    flat = np.abs(values.reshape(-1))
    return np.flatnonzero((flat >= np.float32(threshold)) & (flat > 0))


def nth_smallest(blocks: Blocks, rank: int) -> float:
    """The magnitude of the given rank (1 is the smallest) over all blocks, exactly, without holding them at once.

    The bits of non-negative float32 sort like their values, so a histogram of the upper 16 bits finds the bucket and
    one of the lower 16 bits inside it the value: two passes over the blocks.
    """
    high, before = _bucket((bits >> _HALF for bits in _bits(blocks)), rank)
    low, _ = _bucket((bits[bits >> _HALF == high] & _LOW for bits in _bits(blocks)), rank - before)
    return float(np.array([(high << 16) | low], np.uint32).view(np.float32)[0])


def _bits(blocks: Blocks) -> Iterator[UInt32]:
    for block in blocks():
        yield np.abs(block.reshape(-1)).view(np.uint32)


def _bucket(keys: Iterator[UInt32], rank: int) -> tuple[int, int]:
    """The key that holds the rank, and how many values lie in keys before it."""
    counts = np.zeros(1 << 16, np.int64)
    for part in keys:
        counts += np.bincount(part, minlength=1 << 16)
    ends = np.cumsum(counts)
    key = int(np.searchsorted(ends, rank))
    return key, int(ends[key] - counts[key])


def spread(blocks: Iterable[Float32]) -> tuple[int, float, float]:
    """Count, mean and sum of squared distances from the mean, in one pass with float64 sums (Chan's update)."""
    count, mean, squares = 0, 0.0, 0.0
    for flat in (part for block in blocks for part in parts(block)):
        block_mean = float(flat.mean(dtype=np.float64))
        block_squares = float(np.square(flat.astype(np.float64) - block_mean).sum())
        distance = block_mean - mean
        total = count + flat.size
        mean += distance * flat.size / total
        squares += block_squares + distance**2 * count * flat.size / total
        count = total
    return count, mean, squares


def parts(values: Float32, count: int = 1 << 20) -> Sequence[Float32]:
    """Views of the flattened values, so that float64 work on them stays small."""
    flat = values.reshape(-1)
    return [flat[start : start + count] for start in range(0, flat.size, count)]
