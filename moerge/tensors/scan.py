"""NaN, infinity and factors left at zero, found by their bits without converting a value."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.tensors import files
from moerge.tensors.header import Header, TensorInfo
from moerge.tensors.kind import invalid

# Bits of the exponent (all set in NaN and infinity) and of everything but the sign, per dtype.
_BITS: dict[str, tuple[np.dtype[Any], int, int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF),
    "F32": (np.dtype("<u4"), 0x7F800000, 0x7FFFFFFF),
    "F16": (np.dtype("<u2"), 0x7C00, 0x7FFF),
    "BF16": (np.dtype("<u2"), 0x7F80, 0x7FFF),
}


def scan_finite(path: str | Path, header: Header, zero_endings: tuple[str, ...]) -> tuple[str, ...]:
    """Look at the exponent bits of every value, block by block, for NaN and infinity.

    Returns warnings for tensors with one of `zero_endings` that training never moved from zero. Raises AdapterInvalid
    naming the first tensor that is not finite.
    """
    zeros, candidates = [], 0
    with files.open_file(path, header.limits) as file:
        for name in file.names:
            info = file.info(name)
            if info.dtype not in _BITS:
                continue
            is_zero = _scan_tensor(file, info)
            candidates += name.endswith(zero_endings)
            if is_zero and name.endswith(zero_endings):
                zeros.append(name)
    if not zeros:
        return ()
    if len(zeros) == candidates:
        return ("Every module has a factor that is all zero, so this adapter changes nothing: is it untrained?",)
    return (f"{len(zeros)} of {candidates} modules have a factor that is all zero (untrained), such as {zeros[0]}.",)


def _scan_tensor(file: files.SafetensorsFile, info: TensorInfo) -> bool:
    """Whether all values of a tensor are zero. Raises AdapterInvalid at the first NaN or infinity."""
    dtype, exponent, magnitude = _BITS[info.dtype]
    position, is_zero = 0, True
    for block in files.raw_blocks(file, info.name):
        bits = np.frombuffer(block, dtype=dtype)
        bad = (bits & dtype.type(exponent)) == dtype.type(exponent)
        if bad.any():
            index = int(bad.argmax())
            value = _float_of(bits[index : index + 1], info.dtype)
            raise invalid("A tensor holds a value that is not finite", pointer=info.name, rule="T2",
                          met=f"{value} at position {position + index}", wanted="finite values",
                          remedy="The training run diverged: take an earlier checkpoint, or train again with a "
                          "smaller learning rate.")  # fmt: skip
        is_zero = is_zero and not (bits & dtype.type(magnitude)).any()
        position += bits.size
    return is_zero


def _float_of(bits: npt.NDArray[Any], dtype: str) -> float:
    return float(files.from_bf16(bits)[0] if dtype == "BF16" else bits.view(files.NUMPY[dtype])[0])
