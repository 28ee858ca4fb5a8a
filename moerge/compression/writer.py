"""Writes `compeft/1`, tensor by tensor: what grows with the file lies in a temporary file, not in memory."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from moerge.compression import manifest, planes
from moerge.compression.planes import PIECE_BYTES
from moerge.compression.reader import VERSION
from moerge.compression.ternary import Ternary
from moerge.tensors import files

_IN_MEMORY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Written:
    """What a finished file holds."""

    ternary_bytes: int
    planes_sha256: str


class Writer:
    """Takes ternary tensors in the order of their names, then writes the file. A context manager.

    The same tensors, plain tensors and metadata give the same bytes (for one zlib).
    """

    def __init__(self) -> None:
        self._positions = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - closed in __exit__
        self._signs = bytearray()
        self._rows: list[list[Any]] = []
        self._scales: list[float] = []
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._positions.close()

    def add(self, tensor: Ternary) -> None:
        """Append one tensor. Names must ascend."""
        if self._rows and tensor.name <= self._rows[-1][0]:
            raise ValueError(f"{tensor.name} comes after {self._rows[-1][0]}; names must ascend")
        kept = tensor.positions.size
        coding = planes.coding_for(kept, tensor.size)
        plane = planes.pack(tensor.positions, tensor.size, coding)
        self._positions.write(plane.data)
        self._signs += planes.pack_signs(tensor.negative).tobytes()
        self._rows.append(
            [tensor.name, tensor.dtype, list(tensor.shape), kept, plane.size, coding, tensor.init]
        )  # fmt: skip
        self._scales.append(tensor.scale)
        self._size += tensor.size

    def finish(
        self, stream: BinaryIO, *, plain: Mapping[str, files.Tensor], metadata: Mapping[str, str]
    ) -> Written:  # fmt: skip
        """Write the file. `format`, `version`, `n_params`, `n_nonzero` and `planes_sha256` join the metadata."""
        text, packed = manifest.pack(self._rows)
        scales = np.array(self._scales, "<f4")
        digest = hashlib.sha256(text + scales.tobytes())
        pieces = bytearray()
        lengths = []
        self._positions.seek(0)
        while piece := self._positions.read(PIECE_BYTES):
            digest.update(piece)
            small = planes.deflate(piece)
            pieces += small
            lengths.append(len(small))
        digest.update(self._signs)
        tensors: dict[str, files.Tensor] = {
            "manifest": np.frombuffer(packed, np.uint8),
            "scales": scales,
            "pos": np.frombuffer(pieces, np.uint8),
            "pos_len": np.array(lengths, "<i8"),
            "sign": np.frombuffer(self._signs, np.uint8),
        }
        own = sum(array.nbytes for array in tensors.values() if isinstance(array, np.ndarray))
        facts = {
            "format": "compeft",
            "version": VERSION,
            "n_params": str(self._size),
            "n_nonzero": str(sum(row[3] for row in self._rows)),
            "planes_sha256": digest.hexdigest(),
        }
        tensors |= {f"plain/{name}": tensor for name, tensor in plain.items()}
        files.dump(stream, tensors, {**metadata, **facts})
        return Written(own, digest.hexdigest())
