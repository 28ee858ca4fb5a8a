"""Writes containers, tensor by tensor: what grows with the file lies in temporary files, not in memory."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Self

import numpy as np

from moerge.compression import manifest, planes
from moerge.compression.planes import PIECE_BYTES
from moerge.compression.reader import FORMAT, VERSION
from moerge.compression.ternary import Ternary
from moerge.tensors import files
from moerge.tensors.files import Streamed

_IN_MEMORY_BYTES = 16 * 2**20

WRITER = "moerge 1"

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Written:
    """What a finished file holds."""

    plane_bytes: int
    planes_sha256: str


class Spool:
    """Bytes that are appended now and read from their start later; beyond 16 MiB they lie on disk."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - see close
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, data: "bytes | memoryview[int]") -> None:
        self.size += self._file.write(data)

    def blocks(self) -> Iterator[bytes]:
        """All bytes in pieces of 262,144, the last one shorter."""
        self._file.seek(0)
        while block := self._file.read(PIECE_BYTES):
            yield block

    def streamed(self) -> Streamed:
        """The bytes as a tensor of a safetensors file."""
        return Streamed("U8", (self.size,), self.blocks)


def deflated(
    plane: Spool, packed: Spool, digest: "hashlib._Hash", progress: Progress | None
) -> files.Array:  # fmt: skip
    """Cut a plane into pieces and deflate them into `packed`; returns their lengths. `digest` hears the plane."""
    lengths = []
    for number, piece in enumerate(plane.blocks(), 1):
        digest.update(piece)
        small = planes.deflate(piece)
        packed.append(small)
        lengths.append(len(small))
        if progress:
            progress(min(1.0, number * PIECE_BYTES / plane.size))
    return np.array(lengths, "<i8")


class Writer:
    """Takes ternary tensors in the order of their names, then writes a `compeft/1` file. A context manager.

    The same tensors, plain tensors and metadata give the same bytes (for one zlib).
    """

    def __init__(self) -> None:
        self._positions, self._packed, self._signs = Spool(), Spool(), Spool()
        self._rows: list[list[Any]] = []
        self._scales: list[float] = []
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in (self._positions, self._packed, self._signs):
            spool.close()

    def add(self, tensor: Ternary) -> None:
        """Append one tensor. Names must ascend."""
        if self._rows and tensor.name <= self._rows[-1][0]:
            raise ValueError(f"{tensor.name} comes after {self._rows[-1][0]}; names must ascend")
        kept = tensor.positions.size
        coding = planes.coding_for(kept, tensor.size)
        plane = planes.pack(tensor.positions, tensor.size, coding)
        self._positions.append(plane.data)
        self._signs.append(planes.pack_signs(tensor.negative).data)
        self._rows.append(
            [tensor.name, tensor.dtype, list(tensor.shape), kept, plane.size, coding, tensor.init]
        )  # fmt: skip
        self._scales.append(tensor.scale)
        self._size += tensor.size

    def finish(
        self,
        stream: BinaryIO,
        *,
        plain: Mapping[str, files.Tensor],
        metadata: Mapping[str, str],
        progress: Progress | None = None,
    ) -> Written:
        """Write the file. `format`, `version`, `n_params`, `n_nonzero` and `planes_sha256` join the metadata."""
        text, packed = manifest.pack(self._rows)
        scales = np.array(self._scales, "<f4")
        digest = hashlib.sha256(text + scales.tobytes())
        lengths = deflated(self._positions, self._packed, digest, progress)
        for block in self._signs.blocks():
            digest.update(block)
        own: dict[str, files.Tensor] = {
            "manifest": np.frombuffer(packed, np.uint8),
            "scales": scales,
            "pos": self._packed.streamed(),
            "pos_len": lengths,
            "sign": self._signs.streamed(),
        }
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "n_params": str(self._size),
            "n_nonzero": str(sum(row[3] for row in self._rows)),
            "planes_sha256": digest.hexdigest(),
        }
        return finish(stream, own, plain=plain, metadata={**metadata, **facts})


def finish(
    stream: BinaryIO, own: dict[str, files.Tensor], *, plain: Mapping[str, files.Tensor], metadata: Mapping[str, str]
) -> Written:
    """Write the planes of a container and what stays as it is; `metadata` holds `planes_sha256`."""
    size = sum(files.nbytes(tensor) for tensor in own.values())
    files.dump(stream, own | {f"plain/{name}": tensor for name, tensor in plain.items()}, metadata)
    return Written(size, metadata["planes_sha256"])


def shell_bound(
    claims: Mapping[str, tuple[str, tuple[int, ...]]], rows: Sequence[Sequence[Any]], metadata: Mapping[str, str]
) -> int:
    """Bytes that header and manifest never exceed, for tensors of these dtypes and shapes and rows at their longest."""
    text = len(manifest.pack(rows)[0])
    # zlib stores what it cannot shrink, at five bytes per 16 KiB and a frame of a few bytes.
    packed = text + 5 * (text // 16_000 + 1) + 16
    told = sum(len(f"{key}{value}".encode()) * 2 for key, value in metadata.items())
    return 4096 + told + packed + sum(2 * len(name.encode()) + 160 + 24 * len(claims[name][1]) for name in claims)
