"""`routing_gates.safetensors`: token-level gates of an expert, one vector per adapted module (arXiv 2402.05859).

A tensor is called as its module is in the adapter (PEFT's `base_model.model.` in front may stay) and has the shape
(d_in,), in float16 or float32. The metadata says `method` (phatgoose) and may say `steps`, `lr`, `dataset`, and
`base_model` as name or name@revision.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from moerge.errors import GatesInvalid
from moerge.tensors import files
from moerge.tensors.files import Float32
from moerge.tensors.header import Header
from moerge.tensors.kind import PREFIX

Number = TypeVar("Number", int, float)

FILE = "routing_gates.safetensors"
METHODS = ("phatgoose",)
DTYPES = ("F16", "F32")
_TRAIN_AGAIN = "Train the gates on this adapter (moerge train-gates), or leave the file out."


@dataclass(frozen=True, kw_only=True)
class About:
    """How gates were trained, as far as they say; `base_model` may be followed by @revision."""

    method: str
    steps: int | None = None
    lr: float | None = None
    dataset: str = ""
    base_model: str = ""


def check(header: Header, *, shapes: Mapping[str, tuple[int, int]] | None = None) -> About:
    """What can be said by the header alone; `shapes` are the adapter's (d_out, d_in) by module, where it is known.

    Raises GatesInvalid.
    """
    if not header.tensors:
        raise _invalid("There is no gate in the file", pointer=FILE, met="no tensor", wanted="one per adapted module")
    for module, name in _names(header).items():
        info = header.tensors[name]
        if info.dtype not in DTYPES:
            raise _invalid("A gate has another dtype", pointer=name, met=info.dtype, wanted=" or ".join(DTYPES),
                           remedy="Save the gates in float32.")  # fmt: skip
        if shapes is not None and module not in shapes:
            raise _invalid("A gate has no module in the adapter", pointer=name, met=module,
                           wanted=f"one of {_shown(shapes)}")  # fmt: skip
        width = shapes[module][1] if shapes is not None else math.prod(info.shape)
        if info.shape != (width,) or not width:
            raise _invalid("A gate has not the width of what its module takes in", pointer=name, met=list(info.shape),
                           wanted=[width] if width else "one dimension")  # fmt: skip
    return _about(header.metadata)


def verify(path: str | Path, header: Header | None = None) -> None:
    """Look at every value: finite, and not all zero. Raises GatesInvalid naming the tensor."""
    with files.open_file(path, known=header) as file:
        for name in file.names:
            values = file.float32(name)
            if not np.isfinite(values).all():
                raise _invalid("A gate is not finite", pointer=name, met="NaN or infinity", wanted="finite values")
            if not values.any():
                raise _invalid("A gate is zero, which prefers no token", pointer=name, met="a norm of 0",
                               wanted="a norm above 0")  # fmt: skip


def load(path: str | Path, *, shapes: Mapping[str, tuple[int, int]] | None = None) -> tuple[dict[str, Float32], About]:
    """Gates by module as they are stored, in float32. Raises GatesInvalid, HeaderInvalid, OSError."""
    with files.open_file(path) as file:
        about = check(file.header, shapes=shapes)
        verify(path, file.header)
        return {module: file.float32(name) for module, name in sorted(_names(file.header).items())}, about


def save(path: str | Path, gates: Mapping[str, Float32], about: About) -> None:
    """Write gates for `load`; arrays keep their dtype. Raises GatesInvalid for what `load` would refuse."""
    metadata = {name: str(value) for name, value in vars(about).items() if value not in (None, "")}
    files.write(path, dict(gates), metadata)
    with files.open_file(path) as file:
        check(file.header)
    verify(path)


def _names(header: Header) -> dict[str, str]:
    """Module -> its tensor's name in the file."""
    found: dict[str, str] = {}
    for name in sorted(header.tensors):
        module = name.removeprefix(PREFIX)
        if module in found:
            raise _invalid("A module has two gates", pointer=name, met=found[module], wanted="one name for each module")
        found[module] = name
    return found


def _about(metadata: Mapping[str, str]) -> About:
    method = metadata.get("method", "")
    if method not in METHODS:
        raise _wrong_metadata("method", method or "nothing", " or ".join(METHODS))
    return About(
        method=method,
        steps=_number(metadata, "steps", int, "a whole number above 0"),
        lr=_number(metadata, "lr", float, "a number above 0"),
        dataset=metadata.get("dataset", ""),
        base_model=metadata.get("base_model", ""),
    )


def _number(metadata: Mapping[str, str], name: str, form: type[Number], wanted: str) -> Number | None:
    given = metadata.get(name)
    if given is None:
        return None
    if not re.fullmatch(r"[0-9.eE+\-]{1,30}", given):
        raise _wrong_metadata(name, given[:80], wanted)
    try:
        value = form(given)
    except ValueError:
        raise _wrong_metadata(name, given, wanted) from None
    if not 0 < value < math.inf:
        raise _wrong_metadata(name, given, wanted)
    return value


def _wrong_metadata(name: str, met: str, wanted: str) -> GatesInvalid:
    return _invalid(f"The metadata says something else as {name}", pointer=f"__metadata__/{name}", met=met,
                    wanted=wanted, remedy=f"Write {name} into the metadata of {FILE}.")  # fmt: skip


def _shown(shapes: Mapping[str, tuple[int, int]]) -> str:
    names = sorted(shapes)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "no module at all"


def _invalid(detail: str, *, pointer: str, met: object, wanted: object, remedy: str = _TRAIN_AGAIN) -> GatesInvalid:
    return GatesInvalid(
        f"{detail} ({pointer}): met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy
    )
