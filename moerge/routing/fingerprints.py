"""What an adapter's weights tell by themselves: norms and spectra by module, a sketch of the whole, exact cosines.

The sketch is a count sketch of all values of all deltas in one vector: the value in row o and column j of a module
goes, with sign s(o) t(j), to place h(o) + k(j) modulo the width. For a product of factors that is the convolution of
the count sketches of B's columns and A's rows (Pham & Pagh, 2013, "tensor sketch"), so no delta is formed. It is linear
in the delta: how the delta is factored, and at what rank, makes no difference, and the cosine of two sketches estimates
that of the deltas.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from moerge.routing import spectra
from moerge.tensors import vectors
from moerge.tensors.files import Float32
from moerge.tensors.kind import Dense, LowRank

Deltas = Mapping[str, LowRank | Dense]
Float64 = npt.NDArray[np.float64]

WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Strength:
    """One module's delta: its Frobenius norm, the share of the leading direction, how many directions count."""

    norm: float
    share: float
    effective_rank: float | None


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Of a whole adapter: the norm of all deltas together, their sketch as a unit vector (WIDTH,), and the modules.

    The sketch of an adapter whose deltas are all zero is zero.
    """

    norm: float
    sketch: Float32
    modules: Mapping[str, Strength]


@dataclass(frozen=True)
class Likeness:
    """How one adapter lies to another: cosine of the whole deltas, and norm of the first over that of the second.

    Both are 0 where one of the two is zero.
    """

    cosine: float
    ratio: float


def of_deltas(deltas: Deltas) -> Fingerprint:
    """The fingerprint of an adapter; each delta is read once."""
    total = np.zeros(WIDTH)
    square = 0.0
    modules = {}
    for name, delta in deltas.items():
        spectrum = spectra.of_delta(delta)
        if spectrum is None:
            continue
        modules[name] = Strength(
            norm=sqrt(spectrum.square), share=spectrum.share, effective_rank=spectrum.effective_rank
        )
        square += spectrum.square
        total += _sketch(name, delta)
    size = float(np.linalg.norm(total))
    return Fingerprint(sqrt(square), (total / (size or 1.0)).astype(np.float32), modules)


def compare(first: Deltas, second: Deltas) -> Likeness:
    """Exact likeness without forming products of factors; a module that one of two lacks is a zero delta there.

    Two modules of one name and different shapes have nothing in common.
    """
    inner, squares = 0.0, [0.0, 0.0]
    for name in sorted({*first, *second}):
        pair = [one.get(name) for one in (first, second)]
        for place, delta in enumerate(pair):
            squares[place] += 0.0 if delta is None else _inner(delta, delta)
        one, other = pair
        if one is not None and other is not None and one.shape == other.shape:
            inner += _inner(one, other)
    if min(squares) <= 0:
        return Likeness(0.0, 0.0)
    norms = [sqrt(square) for square in squares]
    return Likeness(max(-1.0, min(1.0, inner / (norms[0] * norms[1]))), norms[0] / norms[1])


def _inner(x: LowRank | Dense, y: LowRank | Dense) -> float:
    """Frobenius inner product of two deltas of one shape; of factors without forming their product."""
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        return vectors.inner(x, y)
    return float(np.vdot(x.delta().astype(np.float64), y.delta().astype(np.float64)))


def _sketch(module: str, delta: LowRank | Dense) -> Float64:
    """The count sketch of one module's delta, (WIDTH,)."""
    if isinstance(delta, LowRank):
        left = np.fft.rfft(_counted(delta.B, f"{module}/out"), axis=0)
        right = np.fft.rfft(_counted(delta.A.T, f"{module}/in"), axis=0)
        return delta.scaling * np.fft.irfft((left * right).sum(axis=1), n=WIDTH)
    counted = _counted(delta.values, f"{module}/out")
    places, signs = _hashes(f"{module}/in", delta.shape[1])
    found = np.zeros(WIDTH)
    for place, sign, column in zip(places, signs, counted.T, strict=True):
        found += sign * np.roll(column, place)
    return found


def _counted(values: npt.NDArray[np.floating], key: str) -> Float64:
    """The count sketch of each column: (d, k) -> (WIDTH, k)."""
    places, signs = _hashes(key, len(values))
    order = np.argsort(places, kind="stable")
    sorted_places = places[order]
    starts = np.flatnonzero(np.diff(sorted_places, prepend=-1))
    found = np.zeros((WIDTH, values.shape[1]))
    found[sorted_places[starts]] = np.add.reduceat(values[order] * signs[order, None], starts, axis=0)
    return found


def _hashes(key: str, count: int) -> tuple[npt.NDArray[np.int64], Float64]:
    """A place in the sketch and a sign for each of `count` indices: of the key alone, the same on every machine."""
    data = np.frombuffer(hashlib.shake_256(key.encode()).digest(2 * count), "<u2").astype(np.int64)
    return data % WIDTH, np.where(data & 0x8000, -1.0, 1.0)
