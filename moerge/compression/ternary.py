"""A ternary tensor: kept positions, their signs, one scale. And the rounding of scales to half precision."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.compression.planes import Bools, Positions
from moerge.tensors import files
from moerge.tensors.files import BF16, Array, Float32

DTYPES = ("F32", "F16", "BF16")
_LARGEST = {"F32": 3.4028234663852886e38, "F16": 65504.0, "BF16": 3.3895313892515355e38}
_SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}


@dataclass(frozen=True, eq=False, kw_only=True)
class Ternary:
    """`scale` times -1, 0 or 1, plus an initial value of 0, 1 or the base model's tensor ("base").

    `positions` are flat row-major indices, ascending; `negative` says of each whether it is -1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    positions: Positions
    negative: Bools
    scale: float
    init: int | str = 0

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stored_scale(self) -> float:
        """The scale as a reader will apply it: float32, then the dtype of the tensor."""
        return float(round_scale(np.float32(self.scale), self.dtype))


def ternary(
    *, name: str, dtype: str, values: Float32, positions: Positions, scale: float, init: int | str = 0
) -> Ternary:
    """Signs of `values` at `positions` under `scale`, which the dtype must be able to hold.

    A negative scale turns the signs round, since a container's scales are not negative. A scale of zero keeps nothing.
    """
    negative = values.reshape(-1)[positions] < 0
    if scale < 0:
        negative = ~negative
    if scale == 0 or positions.size == 0:
        positions, negative, scale = positions[:0], negative[:0], 0.0
    else:
        # Kept values exist in the dtype, so this only moves scales at the very ends of its range.
        scale = min(max(abs(scale), _SMALLEST[dtype]), _LARGEST[dtype])
    return Ternary(name=name, dtype=dtype, shape=values.shape, positions=positions, negative=negative, scale=scale,
                   init=init)  # fmt: skip


def largest(dtype: str) -> float:
    """The largest finite value of F32, F16 or BF16."""
    return _LARGEST[dtype]


def smallest(dtype: str) -> float:
    """The smallest positive value of F32, F16 or BF16."""
    return _SMALLEST[dtype]


def round_scale(scale: npt.NDArray[np.float32] | np.float32, dtype: str) -> npt.NDArray[np.float32]:
    """Float32 scales rounded to nearest even in a dtype, as float32; beyond its range they become infinite or zero."""
    values = np.asarray(scale, np.float32)
    if dtype == "BF16":
        return files.from_bf16(files.to_bf16(values)).reshape(values.shape)
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def as_float32(tensor: Array | BF16) -> Float32:
    """A tensor of any float dtype as float32."""
    return files.from_bf16(tensor.bits) if isinstance(tensor, BF16) else np.asarray(tensor, np.float32)


def blank(shape: tuple[int, ...], dtype: str, fill: float = 0.0) -> Array:
    """An array of the dtype's bit patterns, all `fill`: uint16 for BF16, else the dtype itself."""
    out: npt.NDArray[Any] = np.zeros(shape, files.NUMPY[dtype])
    if fill:
        out.fill(files.to_bf16(np.float32(fill).reshape(1))[0] if dtype == "BF16" else fill)
    return out
