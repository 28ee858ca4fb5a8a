"""Small safetensors files that routing hands out: prototypes of one adapter, and packs of several."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import HeaderInvalid, PackInvalid
from moerge.tensors import files, header
from moerge.tensors.header import Limits

Array = npt.NDArray[Any]

LIMITS = Limits(
    name_pattern=r"[a-z_]+(/[A-Za-z0-9_.\-]+){0,2}", name_bytes=600, metadata_bytes=4 * 2**20,
    dtypes=frozenset({"F16", "F32", "U8"}), empty_tensors=True,
)  # fmt: skip
_REMEDY = "Fetch it again from the hub."


def dump(tensors: Mapping[str, files.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as the bytes of a file; the same input gives the same bytes."""
    stream = io.BytesIO()
    files.dump(stream, tensors, metadata)
    return stream.getvalue()


def load(data: bytes, wanted: str) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata and tensors of a file whose `format` is the one wanted, all values finite. Raises PackInvalid."""
    try:
        head = header.parse(data, len(data), LIMITS)
    except HeaderInvalid as error:
        raise PackInvalid(
            error.detail, pointer=error.pointer, met=error.met, wanted=error.wanted, remedy=_REMEDY, rule=error.rule
        ) from error
    if head.metadata.get("format") != wanted:
        met = head.metadata.get("format", "none")[:80]
        raise invalid("The file has another format", pointer="__metadata__/format", met=met, wanted=wanted)
    tensors = {}
    for name, info in head.tensors.items():
        values = np.frombuffer(
            data, files.NUMPY[info.dtype], count=info.size, offset=head.data_start + info.start
        ).reshape(info.shape)
        if not np.isfinite(values).all():
            raise invalid("A value is not finite", pointer=name, met="NaN or infinity", wanted="finite values")
        tensors[name] = values
    return head.metadata, tensors


def invalid(detail: str, *, pointer: str, met: object, wanted: object, remedy: str = _REMEDY) -> PackInvalid:
    """A PackInvalid whose message repeats the values met and wanted."""
    return PackInvalid(f"{detail}: met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy)
