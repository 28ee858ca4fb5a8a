"""Scales of ternary tensors, found from the tensors alone.

Reconstruction error is the wrong target for a LoRA pair: the scale that minimises it is beaten in likelihood by larger
ones at every density. What keeps accuracy is a product that is unbiased along the original, `<BA, c*Bh*Ah> = <BA, BA>`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from moerge.compression.planes import Positions
from moerge.compression.selection import parts
from moerge.tensors.files import Float32

RULES = ("unbiased", "norm", "proj", "geo", "mse")
# An unbiased scale grows without bound as the kept signs lose the direction of the product (cosine below 1/4).
CAP = 4.0
_BLOCK_VALUES = 1 << 20

Gram = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kept:
    """One tensor's kept values: how many, their mean magnitude, and the squared norm of the whole tensor."""

    count: int
    mean: float
    squared_norm: float


@dataclass(frozen=True)
class Product:
    """Inner products of a LoRA product and its ternary image: <BA, BA>, <BA, Bh*Ah>, <Bh*Ah, Bh*Ah>."""

    oo: float
    x: float
    hh: float

    def cosine(self) -> float | None:
        """Of the two products; None when one is zero."""
        return self.x / sqrt(self.oo * self.hh) if self.oo > 0 and self.hh > 0 else None

    def relative_error(self, factor: float) -> float | None:
        """|BA - factor*Bh*Ah| / |BA|; None when BA is zero."""
        if self.oo <= 0:
            return None
        return sqrt(max(0.0, self.oo - 2 * factor * self.x + factor**2 * self.hh) / self.oo)


def measure(values: Float32, positions: Positions) -> Kept:
    """Statistics of the values kept at `positions`, with float64 sums."""
    flat = values.reshape(-1)
    total = sum(float(np.abs(flat[part]).sum(dtype=np.float64)) for part in _cut(positions))
    squared = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts(flat))
    return Kept(positions.size, total / positions.size if positions.size else 0.0, squared)


def image(values: Float32, positions: Positions, mean: float) -> Float32:
    """Dense `mean` times the signs of the kept values, zero elsewhere."""
    out = np.zeros(values.shape, np.float32)
    out.reshape(-1)[positions] = np.sign(values.reshape(-1)[positions]) * np.float32(mean)
    return out


def product(A: Float32, B: Float32, A_image: Float32, B_image: Float32) -> Product:
    """(rank, in), (out, rank) and their images -> inner products of B·A and its image, without forming either."""
    aa, ah, hh = _grams(A, A_image)
    bb, bh, kk = _grams(B.T, B_image.T)
    return Product(float((bb * aa).sum()), float((bh * ah).sum()), float((kk * hh).sum()))


def factor(moments: Product, rule: str) -> float:
    """The factor c on the product of two images of mean kept magnitude, by rule.

    Falls back to `norm` where the unbiased or projected factor would not be positive, and to 1 where the image of the
    product is zero, so that no factor matters. A product that is zero gets 0.
    """
    if rule == "mse":
        return 1.0
    if moments.oo <= 0:
        return 0.0
    if moments.hh <= 0:
        return 1.0
    norm = sqrt(moments.oo / moments.hh)
    if rule == "norm" or moments.x <= 0:
        return norm
    if rule == "proj":
        return moments.x / moments.hh
    unbiased = min(moments.oo / moments.x, CAP * norm)
    return sqrt(unbiased * norm) if rule == "geo" else unbiased


def lone(kept: Kept, rule: str) -> float:
    """The scale of a tensor that has no partner. `proj` and `mse` are one here: the mean kept magnitude."""
    if kept.count == 0:
        return 0.0
    unbiased = kept.squared_norm / (kept.mean * kept.count)
    norm = sqrt(kept.squared_norm / kept.count)
    return {"unbiased": unbiased, "norm": norm, "geo": sqrt(unbiased * norm)}.get(rule, kept.mean)


def _grams(left: Float32, other: Float32) -> tuple[Gram, Gram, Gram]:
    """(rank, n), (rank, n) -> left·leftᵀ, left·otherᵀ, other·otherᵀ in float64, block by block along n."""
    rank = left.shape[0]
    own, across, image = (np.zeros((rank, rank)) for _ in range(3))
    width = max(1, _BLOCK_VALUES // max(1, rank))
    for start in range(0, left.shape[1], width):
        first = left[:, start : start + width].astype(np.float64)
        second = other[:, start : start + width].astype(np.float64)
        own += first @ first.T
        across += first @ second.T
        image += second @ second.T
    return own, across, image


def _cut(positions: Positions) -> Iterator[Positions]:
    for start in range(0, positions.size, _BLOCK_VALUES):
        yield positions[start : start + _BLOCK_VALUES]
