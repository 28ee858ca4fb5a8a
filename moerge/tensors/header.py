"""Safetensors header: names, dtypes, shapes and offsets, read strictly before any tensor byte is touched.

The format is: eight bytes little-endian length, that many bytes of JSON, then the tensor bytes without gaps
(https://github.com/huggingface/safetensors). The rules here are stricter than the reference reader, never looser:
whatever `parse` accepts, the reference reader accepts with the same meaning (`files.check_agreement` proves it per
file). Standard library only, so that a web process checks an upload without numpy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from moerge.errors import HeaderInvalid
from moerge.tensors import strict

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_RESAVE = "Save the adapter again with PeftModel.save_pretrained (safetensors is its default)."
_UPLOAD_AGAIN = "Upload the file again; if the copy on your disk is also short, save it again."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a header may claim. The defaults are those for adapter weights; COMPEFT widens them for encoded files."""

    header_bytes: int = 16 * 2**20
    tensor_count: int = 200_000
    metadata_bytes: int = 64_000
    name_bytes: int = 512
    dimension: int = 2**31
    dimensions_count: int = 8
    dtypes: frozenset[str] = WEIGHT_DTYPES
    name_pattern: str = r"[A-Za-z0-9_.\-]+"
    empty_tensors: bool = False


COMPEFT = Limits(dtypes=frozenset(ITEM_BYTES), name_pattern=r"(plain/)?[A-Za-z0-9_.\-]+", empty_tensors=True)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `start` and `end` count bytes from the end of the header, as in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header; tensor bytes begin at `data_start` of a file of `file_size` bytes."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int
    file_size: int
    limits: Limits = field(default=Limits(), repr=False)


def claimed_bytes(first: bytes, file_size: int, limits: Limits = Limits()) -> int:
    """Bytes to read from the start of a file to have its whole header, from its first eight bytes alone.

    Raises HeaderInvalid when the claim cannot be true or is larger than allowed, so that nothing is read for it.
    """
    if len(first) < 8 or file_size < 8:
        met = min(len(first), file_size)
        raise _invalid("The file is too short for a safetensors file", met=f"{met} bytes", wanted="at least 8 bytes")
    _refuse_known_formats(first)
    length = int.from_bytes(first[:8], "little")
    if length > limits.header_bytes:
        raise _invalid(
            "The header claims to be larger than any adapter needs",
            met=f"{length} bytes",
            wanted=f"at most {limits.header_bytes} bytes",
            remedy="If this file is safetensors, move long metadata to the card. " + _RESAVE,
            rule="T2",
        )
    if length > file_size - 8:
        raise _invalid(
            "The file ends before its header does",
            met=f"a header of {length} bytes in a file of {file_size} bytes",
            wanted=f"at most {file_size - 8} bytes of header",
            remedy=_UPLOAD_AGAIN,
        )
    return 8 + length


def parse(head: bytes, file_size: int, limits: Limits = Limits()) -> Header:
    """The header at the start of `head` (eight bytes of length, then JSON; more may follow and is not looked at).

    `file_size` is the size of the whole file. Raises HeaderInvalid, and nothing else, for any bytes whatever.
    """
    end = claimed_bytes(head[:8], file_size, limits)
    if len(head) < end:
        raise _invalid("The file ends before its header does", met=f"{len(head)} bytes", wanted=f"{end} bytes",
                       remedy=_UPLOAD_AGAIN)  # fmt: skip
    text = head[8:end]
    if not text.startswith(b"{"):
        raise _invalid("The header is not a JSON object", met=_shown(text[:16]), wanted="{ as its first byte")
    try:
        # Each tensor is one member of the top level and has three of its own.
        members = strict.loads(text, max_keys=4 * limits.tensor_count + 100_000)
    except strict.Malformed as error:
        rule = "T2" if error.pointer else "T3"
        raise _invalid(f"The header is not strict JSON: {error}", pointer=error.pointer, met=str(error),
                       wanted="JSON without duplicate keys", rule=rule) from error  # fmt: skip
    metadata = _metadata(members.pop("__metadata__", None), limits)
    if len(members) > limits.tensor_count:
        raise _invalid("The file holds too many tensors", met=len(members),
                       wanted=f"at most {limits.tensor_count}", rule="T2")  # fmt: skip
    tensors = {name: _tensor(name, claim, limits) for name, claim in members.items()}
    _check_layout(tensors, file_size - end)
    return Header(metadata, tensors, end, file_size, limits)


def read(path: str | Path, limits: Limits = Limits()) -> Header:
    """The header of the file at `path`; reads no more than the header. Raises HeaderInvalid, OSError."""
    path = Path(path)
    with path.open("rb") as stream:
        size = path.stat().st_size
        first = stream.read(8)
        more = stream.read(claimed_bytes(first, size, limits) - 8)
    return parse(first + more, size, limits)


_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, which is how torch.save writes pickles"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x93NUMPY", "a numpy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"Rar!", "a RAR archive"),
)


def _refuse_known_formats(first: bytes) -> None:
    """Name the usual wrong files. A safetensors file starts with a small number, so none of these can be one."""
    found = next((what for magic, what in _SIGNATURES if first.startswith(magic)), "")
    # Pickle protocols 2 to 5 start with 0x80 and their number. As the low bytes of a header length, those are valid
    # (0x280 is 640), so a pickle is told by its third byte on: an opcode, where a short header has zeros.
    if not found and first[0] == 0x80 and first[1] in (2, 3, 4, 5) and any(first[3:8]):
        found = "a pickle, which can run code when it is opened"
    if found:
        raise _invalid("The file is not safetensors, whatever its name says", met=found, wanted="a safetensors file",
                       rule="U6")  # fmt: skip


def _metadata(claim: Any, limits: Limits) -> dict[str, str]:
    if claim is None:
        return {}
    if not isinstance(claim, dict):
        raise _invalid("__metadata__ is not an object", pointer="__metadata__", met=type(claim).__name__,
                       wanted="an object of strings", rule="T1")  # fmt: skip
    total = 0
    for key, value in claim.items():
        if not isinstance(value, str):
            raise _invalid("A value of __metadata__ is not a string", pointer=f"__metadata__/{key}"[:600],
                           met=type(value).__name__, wanted="a string", rule="T1")  # fmt: skip
        total += len(key.encode()) + len(value.encode())
    if total > limits.metadata_bytes:
        raise _invalid(
            "__metadata__ is too large",
            pointer="__metadata__",
            met=f"{total} bytes",
            rule="T2",
            wanted=f"at most {limits.metadata_bytes} bytes",
            remedy="Put long texts in README.md.",
        )
    return claim


def _tensor(name: str, claim: Any, limits: Limits) -> TensorInfo:
    if not re.fullmatch(limits.name_pattern, name) or len(name) > limits.name_bytes:
        shown = _shown(name.encode()[:80])
        raise _invalid("A tensor name is not allowed", pointer=_shown(name.encode())[:512], met=shown,
                       wanted=f"1 to {limits.name_bytes} characters of A-Z a-z 0-9 _ . -", rule="T2")  # fmt: skip
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        met = sorted(claim) if isinstance(claim, dict) else type(claim).__name__
        raise _invalid("A tensor entry has wrong fields", pointer=name, met=str(met)[:200],
                       wanted="exactly data_offsets, dtype and shape", rule="T2")  # fmt: skip
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in limits.dtypes:
        raise _invalid("A tensor has a dtype that is not allowed here", pointer=name, met=str(dtype)[:80], rule="T2",
                       wanted=", ".join(sorted(limits.dtypes)),
                       remedy="Save the weights as float32, float16 or bfloat16, not quantised.")  # fmt: skip
    if not _integers(shape) or len(shape) > limits.dimensions_count or any(n > limits.dimension for n in shape):
        raise _invalid(
            "A tensor has an impossible shape",
            pointer=name,
            met=str(shape)[:200],
            rule="T2",
            wanted=f"at most {limits.dimensions_count} whole numbers from 0 to {limits.dimension}",
        )
    if not limits.empty_tensors and 0 in shape:
        raise _invalid("A tensor has no values", pointer=name, met=str(shape), wanted="every dimension at least 1",
                       remedy="Weights sharded by DeepSpeed or FSDP must be gathered before they are saved.",
                       rule="T2")  # fmt: skip
    if not _integers(offsets) or len(offsets) != 2:
        raise _invalid("A tensor has impossible data_offsets", pointer=name, met=str(offsets)[:200],
                       wanted="[start, end]", rule="T1")  # fmt: skip
    wanted = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise _invalid(
            "A tensor's bytes do not fit its shape and dtype",
            pointer=name,
            rule="T1",
            met=f"{offsets[1] - offsets[0]} bytes",
            wanted=f"{wanted} bytes for {dtype} {shape}",
        )
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _integers(value: Any) -> bool:
    """Plain non-negative integers only: for Python `True` and `1.0` equal 1, for other readers they do not."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for info in sorted(tensors.values(), key=lambda item: (item.start, item.end)):
        if info.start != position:
            what = "overlap" if info.start < position else "leave a gap"
            raise _invalid(f"Tensor bytes {what}", pointer=info.name, met=f"start {info.start}",
                           wanted=f"start {position}", rule="T1")  # fmt: skip
        position = info.end
    if position != data_bytes:
        short = position > data_bytes
        raise _invalid(
            "The file ends before its tensors do" if short else "Bytes follow the last tensor",
            met=f"{data_bytes} bytes of tensors",
            wanted=f"{position} bytes",
            remedy=_UPLOAD_AGAIN if short else _RESAVE,
            rule="T1",
        )


def _shown(data: bytes) -> str:
    return ascii(data)[2:-1]


def _invalid(
    detail: str, *, pointer: str = "header", met: object, wanted: object, remedy: str = _RESAVE, rule: str = "T1"
) -> HeaderInvalid:
    return HeaderInvalid(
        f"{detail}: met {met}, wanted {wanted}.", pointer=pointer or "header", met=met, wanted=wanted, remedy=remedy,
        rule=rule,
    )  # fmt: skip
