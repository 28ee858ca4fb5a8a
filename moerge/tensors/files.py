"""Safetensors files, one tensor at a time: bfloat16 without torch, and the same bytes for the same tensors.

Bytes are read with pread rather than mapped, because a mapped file that shrinks while it is read kills the process.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import safetensors

from moerge.errors import HeaderInvalid
from moerge.tensors import header
from moerge.tensors.header import Header, Limits, TensorInfo

Float32 = npt.NDArray[np.float32]
UInt16 = npt.NDArray[np.uint16]
Array = npt.NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in NUMPY.items() if name not in ("BF16", "U16")}
_BLOCK_BYTES = 1 << 24
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class BF16:
    """Bfloat16 values as the uint16 bit patterns numpy can hold."""

    bits: UInt16


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made only when it is written, so that a large file never lies in memory as a whole."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], "Array | BF16"]


@dataclass(frozen=True)
class Streamed:
    """A tensor whose stored bytes come in blocks when it is written, so that not even one lies in memory as a whole."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[bytes]]


Tensor = Array | BF16 | Lazy | Streamed


def to_bf16(values: npt.NDArray[np.floating[Any]]) -> UInt16:
    """Float32 values to bfloat16 bits, rounded to nearest, ties to even, as torch does; NaN stays NaN."""
    shape = values.shape
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN of small payload into infinity, so NaNs become the one quiet NaN.
    result: UInt16 = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(shape)
    return result


def from_bf16(bits: UInt16) -> Float32:
    """Bfloat16 bits to the float32 values they stand for, exactly."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    # ascontiguousarray gives the array of a scalar one dimension.
    return wide.view(np.float32).reshape(bits.shape)


def to_dtype(values: Float32, dtype: str) -> "Array | BF16":
    """Float32 values as what `write` takes for the safetensors dtype F64, F32, F16 or BF16."""
    return BF16(to_bf16(values)) if dtype == "BF16" else values.astype(NUMPY[dtype])


class SafetensorsFile:
    """An open file whose header has been parsed strictly. A context manager; reads need no lock (pread)."""

    def __init__(
        self,
        path: str | Path,
        limits: Limits = Limits(),  # noqa: B008 - frozen record
        *,
        known: Header | None = None,
    ) -> None:
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            size = os.fstat(self._descriptor).st_size
            if known is not None and known.file_size == size:
                self.header = known
                return
            first = os.pread(self._descriptor, 8, 0)
            head = first + self._read(8, header.claimed_bytes(first, size, limits) - 8)
            self.header = header.parse(head, size, limits)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def metadata(self) -> dict[str, str]:
        return self.header.metadata

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return tuple(sorted(self.header.tensors))

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def info(self, name: str) -> TensorInfo:
        return self.header.tensors[name]

    def raw(self, name: str) -> bytes:
        """The stored bytes of one tensor."""
        info = self.header.tensors[name]
        return self._read(self.header.data_start + info.start, info.end - info.start)

    def array(self, name: str) -> Array:
        """One tensor in its own dtype and shape; bfloat16 as uint16 bits."""
        info = self.header.tensors[name]
        return np.frombuffer(self.raw(name), dtype=NUMPY[info.dtype]).reshape(info.shape)

    def float32(self, name: str) -> Float32:
        """One tensor as a float32 array of its shape, writable and the caller's own."""
        info = self.header.tensors[name]
        return _as_float32(self.raw(name), info.dtype).reshape(info.shape)

    def block(self, name: str, start: int, count: int) -> Float32:
        """Values `start` to `start + count` of the flattened tensor as float32; shorter at its end."""
        info = self.header.tensors[name]
        item = header.ITEM_BYTES[info.dtype]
        count = max(0, min(count, info.size - start))
        return _as_float32(self._read(self.header.data_start + info.start + start * item, count * item), info.dtype)

    def block_into(self, name: str, start: int, out: Float32) -> None:
        """Fill `out`, contiguous and one-dimensional, with values of the flattened tensor from `start` on."""
        info = self.header.tensors[name]
        if not 0 <= start <= start + out.size <= info.size:
            raise IndexError(f"{name} has {info.size} values, and {start} to {start + out.size} were asked for")
        stored = np.empty(out.size, NUMPY[info.dtype])
        self._fill(stored, self.header.data_start + info.start + start * stored.itemsize)
        if info.dtype == "BF16":
            bits = out.view(np.uint32)
            bits[:] = stored
            bits <<= np.uint32(16)
        else:
            out[:] = stored

    def read_data(self, start: int, count: int) -> bytes:
        """`count` bytes from byte `start` of the tensor data, as offsets in the header count."""
        return self._read(self.header.data_start + start, count)

    def _fill(self, values: Array, offset: int) -> None:
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if not count:
                raise self._shortened(offset, len(view))
            view, offset = view[count:], offset + count

    def _shortened(self, offset: int, count: int) -> HeaderInvalid:
        return HeaderInvalid(
            f"{self.path.name} became shorter while it was read.", pointer=self.path.name, rule="T1",
            met=f"the end at byte {offset}", wanted=f"{count} more bytes", remedy="Upload the file again.",
        )  # fmt: skip

    def _read(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0:
            part = os.pread(self._descriptor, count, offset)
            if not part:
                raise self._shortened(offset, count)
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]


def open_file(
    path: str | Path,
    limits: Limits = Limits(),  # noqa: B008 - frozen record
    *,
    known: Header | None = None,
) -> SafetensorsFile:
    """Open a safetensors file and parse its header strictly. Raises HeaderInvalid, OSError.

    `known` is the header of this very file where it was parsed before; parsing takes longer than reading a tensor.
    """
    return SafetensorsFile(path, limits, known=known)


def check_agreement(path: str | Path, parsed: Header) -> None:
    """Hand the same file to the safetensors library and compare: names, dtypes, shapes and metadata must be equal.

    A file that two readers understand differently can show one thing to a checker and another to its users.
    Raises HeaderInvalid when the library refuses the file or differs.
    """
    try:
        with safetensors.safe_open(str(path), framework="np") as other:
            metadata = dict(other.metadata() or {})
            slices = {name: other.get_slice(name) for name in other.keys()}  # noqa: SIM118 - not a mapping
            theirs = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise HeaderInvalid(
            f"The safetensors library refuses the file: {error}", pointer="header", met=str(error), rule="T3",
            wanted="a file that the reference reader opens", remedy="Save the adapter again with save_pretrained.",
        ) from error  # fmt: skip
    ours = {name: (info.dtype, info.shape) for name, info in parsed.tensors.items()}
    if ours != theirs or metadata != parsed.metadata:
        name = next((n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)), "__metadata__")
        raise HeaderInvalid(
            "Two readers understand the header differently.", pointer=name, met=str(theirs.get(name)), rule="T3",
            wanted=str(ours.get(name)), remedy="Save the adapter again with save_pretrained.",
        )  # fmt: skip


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (name -> numpy array, BF16, Lazy or Streamed) as safetensors; the same input gives the same bytes.

    Wide dtypes come first and names are sorted, as the reference writer does, so that every tensor lies aligned.
    """
    with Path(path).open("wb") as stream:
        dump(stream, tensors, metadata)


def dump(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """What `write` writes, to an open binary stream."""
    claims = {name: claim(tensor) for name, tensor in tensors.items()}
    head, places = plan(claims, metadata)
    stream.write(head)
    for name in places:
        tensor = tensors[name]
        if isinstance(tensor, Streamed):
            _pour(stream, name, tensor)
        else:
            stream.write(_bytes(name, tensor, claims[name]))


def plan(
    claims: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The head of the file that `write` writes, and the byte of the file at which each tensor begins, in file order."""
    order = sorted(claims, key=lambda name: (-header.ITEM_BYTES[claims[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places = {}
    position = 0
    for name in order:
        dtype, shape = claims[name]
        end = position + prod(shape) * header.ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        places[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + place for name, place in places.items()}


def sha256(path: str | Path, progress: Callable[[float], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in blocks; `progress` hears the share that is done."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
            if progress:
                progress(min(1.0, stream.tell() / max(1, size)))
    return digest.hexdigest()


def float32_blocks(file: SafetensorsFile, name: str, count: int = _BLOCK_BYTES // 4) -> Iterator[Float32]:
    """The flattened tensor in pieces of `count` values, so that memory does not grow with the tensor."""
    for start in range(0, file.info(name).size, count):
        yield file.block(name, start, count)


def raw_blocks(file: SafetensorsFile, name: str, count_bytes: int = _BLOCK_BYTES) -> Iterator[bytes]:
    """The stored bytes of one tensor in pieces of `count_bytes`, a multiple of every item size."""
    info = file.info(name)
    for start in range(info.start, info.end, count_bytes):
        yield file.read_data(start, min(count_bytes, info.end - start))


def claim(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Safetensors dtype and shape under which `write` will store a tensor."""
    if isinstance(tensor, Lazy | Streamed):
        return tensor.dtype, tensor.shape
    if isinstance(tensor, BF16):
        return "BF16", tensor.bits.shape
    return _NAMES[tensor.dtype.newbyteorder("<") if tensor.dtype.itemsize > 1 else tensor.dtype], tensor.shape


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a file, its header entry aside."""
    dtype, shape = claim(tensor)
    return prod(shape) * header.ITEM_BYTES[dtype]


def _pour(stream: BinaryIO, name: str, tensor: Streamed) -> None:
    written = sum(stream.write(block) for block in tensor.blocks())
    if written != nbytes(tensor):
        raise ValueError(f"{name} was announced with {nbytes(tensor)} bytes and came with {written}")


def _bytes(name: str, tensor: Array | BF16 | Lazy, wanted: tuple[str, tuple[int, ...]]) -> bytes:
    made = tensor.make() if isinstance(tensor, Lazy) else tensor
    if claim(made) != wanted:
        raise ValueError(f"{name} was announced as {wanted} and made as {claim(made)}")
    values = made.bits if isinstance(made, BF16) else made
    return np.ascontiguousarray(values, dtype=NUMPY[wanted[0]]).tobytes()


def _as_float32(data: bytes, dtype: str) -> Float32:
    values = np.frombuffer(data, dtype=NUMPY[dtype])
    return from_bf16(values) if dtype == "BF16" else values.astype(np.float32)
