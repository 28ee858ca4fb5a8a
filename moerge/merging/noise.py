"""Noise that depends only on what it is for: seed, expert, tensor and flat index, never on who computes it or when.

Philox 4x64 is a counter-based generator, so any stretch of a stream can be made alone (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). numpy keeps the raw output of its bit generators stable over releases, which it
does not promise for distributions; so only raw bits are used.
"""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]
# One value uses 24 bits, so that float32 holds every threshold exactly.
STEPS = 1 << 24
_VALUES_PER_COUNT = 8


def key(seed: int, digest: str, tensor: str) -> tuple[int, int]:
    """The 128-bit key of the stream for one tensor of one expert."""
    text = "\0".join(["moerge.noise/1", str(seed), digest, tensor])
    raw = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")


def stream(key: tuple[int, int], offset: int, count: int) -> Bits:
    """Values offset .. offset + count of a stream, each uniform on 0 .. 2^24 - 1, (count,)."""
    first = offset // _VALUES_PER_COUNT
    skip = offset - first * _VALUES_PER_COUNT
    counts = -(-(skip + count) // _VALUES_PER_COUNT)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=first)
    words = np.asarray(generator.random_raw(counts * _VALUES_PER_COUNT // 2), dtype="<u8").view("<u4")
    return (words[skip : skip + count] >> np.uint32(8)).astype(np.uint32, copy=False)


def keep(bits: Bits, probability: float | npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """True with the given probability per value, rounded to a multiple of 2^-24."""
    if isinstance(probability, float | int):
        return bits < np.uint32(round(probability * STEPS))
    return np.asarray(bits < np.rint(probability * STEPS).astype(np.uint32))


def signs(key: tuple[int, int], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A matrix of +1 and -1, the test matrix of randomised SVD."""
    bits = stream(key, 0, math.prod(shape))
    return np.where(bits & np.uint32(1), np.float32(1), np.float32(-1)).reshape(shape)
