"""Task vectors, tensor by tensor: what was trained, minus what it started from."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from moerge.compression import selection
from moerge.compression.ternary import as_float32
from moerge.errors import AdapterInvalid
from moerge.tensors import files
from moerge.tensors.files import BF16, Array, Float32

# 0, 1, the base model's tensor, or a function that reads it.
Start = int | Array | BF16 | Callable[[], Array | BF16]


class TensorSource(Protocol):
    """Tensors by name, read one at a time; `claim` gives dtype and shape without reading.

    What `float32` returns is the caller's own to write to.
    """

    def names(self) -> list[str]: ...

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]: ...

    def float32(self, name: str) -> Float32: ...


class Arrays:
    """Tensors that are already in memory, as a source."""

    def __init__(self, tensors: Mapping[str, Array | BF16]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        return files.claim(self._tensors[name])

    def float32(self, name: str) -> Float32:
        tensor = self._tensors[name]
        return as_float32(tensor) if isinstance(tensor, BF16) else np.array(tensor, np.float32)


def init_of(start: Start) -> int | str:
    """How an initial value is named in a manifest: 0, 1 or "base"."""
    return start if isinstance(start, int) else "base"


def difference(
    source: TensorSource, name: str, start: Start
) -> Float32:  # fmt: skip
    """A tensor minus its initial value. Raises AdapterInvalid for NaN and infinity, and for a base of another shape."""
    values = source.float32(name)
    if isinstance(start, int):
        if start:
            np.subtract(values, np.float32(start), out=values)
    else:
        base = as_float32(start() if callable(start) else start)
        if base.shape != values.shape:
            raise AdapterInvalid(
                f"{name} and the base model's tensor have different shapes.", pointer=name, met=list(values.shape),
                wanted=list(base.shape), remedy="Pass the checkpoint that this one was trained from.",
            )  # fmt: skip
        np.subtract(values, base, out=values)
    seen = 0
    for part in selection.parts(values):
        bad = ~np.isfinite(part)
        if bad.any():
            index = seen + int(np.argmax(bad))
            raise AdapterInvalid(
                f"{name} holds {part[bad][0]} at index {index}, which is not a finite value.", pointer=name,
                met=f"{part[bad][0]} at index {index}", wanted="finite values",
                remedy="Train again with a lower learning rate or in bfloat16.",
            )  # fmt: skip
        seen += part.size
    return values
