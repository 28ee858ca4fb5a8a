"""The manifest of `compeft/1`: one entry per ternary tensor, written deterministically and read with suspicion."""

import json
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from moerge.compression.planes import GAP8, MASK
from moerge.compression.rules import refuse
from moerge.compression.ternary import DTYPES, round_scale
from moerge.tensors import strict
from moerge.tensors.header import ITEM_BYTES

INFLATED_BYTES = 8 * 2**20
ENTRIES = 65_536
NAME_BYTES = 512
DIMENSIONS = 8
INITS: tuple[int | str, ...] = (0, 1, "base")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a caller is ready to spend on a file that it does not trust.

    A few bytes can claim tensors of any size, because a tensor may keep no value; so the claims have a limit of
    their own: `values` over all entries, `output_bytes` for what they decode to.
    """

    file_bytes: int = 2**34
    values: int = 2**32
    output_bytes: int = 2**33


@dataclass(frozen=True, slots=True)
class Entry:
    """One ternary tensor of a file. `plane_start` and `sign_start` count bytes of the decoded planes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kept: int
    plane_bytes: int
    coding: int
    init: int | str
    scale: float
    plane_start: int
    sign_start: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def output_bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


def pack(rows: Sequence[Sequence[Any]]) -> tuple[bytes, bytes]:
    """Rows `[name, dtype, shape, nnz, plane_bytes, coding, init]` as (JSON, zlib stream of it)."""
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    return text, zlib.compress(text, 9)


def inflate(data: bytes) -> bytes:
    """The manifest's JSON. Rules C2.inflate and C2.size."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, INFLATED_BYTES + 1)
    except zlib.error as error:
        refuse("C2.inflate", "manifest", met=str(error), wanted="a zlib stream")
    if len(text) > INFLATED_BYTES:
        refuse("C2.size", "manifest", met=f"more than {INFLATED_BYTES} bytes", wanted=f"at most {INFLATED_BYTES}")
    if not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
        met = "an unfinished stream" if not unpacker.eof else "bytes after the stream"
        refuse("C2.inflate", "manifest", met=met, wanted="one complete zlib stream")
    return text


def parse(
    text: bytes,
    *,
    budget: Budget,
    taken: frozenset[str],
    expected: Mapping[str, tuple[int, ...]] | None,
    check_rest: Callable[[list[Any], str], None] | None = None,
) -> list[list[Any]]:
    """Checked rows of a manifest. `taken` are the names of plain tensors. Rules C2.

    Every row begins with name, dtype and shape and ends with the initial value; `check_rest` looks at the length of a
    row and at what lies between, by default as `compeft/1` has it.
    """
    try:
        rows = strict.loads(text, max_keys=0, max_depth=3)
    except strict.Malformed as error:
        refuse("C2.json", "manifest", met=str(error), wanted="strict JSON of three levels")
    if not isinstance(rows, list):
        refuse("C2.entry", "manifest", met=type(rows).__name__, wanted="an array of entries")
    if len(rows) > ENTRIES:
        refuse("C2.count", "manifest", met=len(rows), wanted=f"at most {ENTRIES}")
    previous: str | None = None
    values = output_bytes = 0
    for number, row in enumerate(rows):
        (check_rest or _check_ternary)(row, f"manifest entry {number}")
        _check_claim(row, f"manifest entry {number}")
        name, dtype, shape = row[0], row[1], row[2]
        if name in taken or name == previous:
            refuse("C2.unique", name, met="the name twice", wanted="once")
        if previous is not None and name < previous:
            refuse("C2.sorted", name, met=f"after {previous}", wanted="before it")
        previous = name
        values += prod(shape)
        output_bytes += prod(shape) * ITEM_BYTES[dtype]
        # numpy refuses a shape by its non-zero dimensions, so an empty tensor's claim is measured by them too.
        if values > budget.values or prod(max(side, 1) for side in shape) > budget.values:
            refuse("C2.values", name, met=f"a shape of {_shown(shape)}", wanted=f"at most {budget.values} in all")
        if output_bytes > budget.output_bytes:
            refuse("C2.budget", name, met=f"{output_bytes} bytes so far", wanted=f"at most {budget.output_bytes}")
        if expected is not None and expected.get(name) != tuple(shape):
            refuse("C2.expected", name, met=_shown(shape), wanted=expected.get(name, "no such tensor"))
    return rows


def check_length(row: Any, where: str, *, fields: int) -> None:
    """An entry is a list of so many fields. Rule C2.entry."""
    if not isinstance(row, list) or len(row) != fields:
        refuse("C2.entry", where, met=_shown(row), wanted=f"{fields} fields")


def _check_claim(row: list[Any], where: str) -> None:
    """Name, dtype and shape in front, the initial value at the end."""
    name, dtype, shape, init = row[0], row[1], row[2], row[-1]
    if not isinstance(name, str):
        refuse("C2.entry", where, met=_shown(name), wanted="a name")
    control = any(unicodedata.category(character) == "Cc" for character in name)
    if not 1 <= len(name.encode()) <= NAME_BYTES or control or name == "__metadata__":
        refuse("C2.name", where, met=ascii(name)[:80], wanted=f"1 to {NAME_BYTES} bytes, no control characters")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse("C2.dtype", name, met=_shown(dtype), wanted=", ".join(DTYPES))
    if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(_is_count(side) for side in shape):
        refuse("C2.shape", name, met=_shown(shape), wanted=f"at most {DIMENSIONS} integers from 0")
    if type(init) not in (int, str) or init not in INITS:
        refuse("C2.init", name, met=_shown(init), wanted='0, 1 or "base"')


def _check_ternary(row: Any, where: str) -> None:
    check_length(row, where, fields=7)
    _, _, _, kept, plane_bytes, coding, _ = row
    if not _is_count(kept) or not _is_count(plane_bytes):
        refuse("C2.entry", where, met=f"nnz {_shown(kept)}, plane_bytes {_shown(plane_bytes)}", wanted="integers")
    if type(coding) is not int or coding not in (GAP8, MASK):
        refuse("C2.coding", where, met=_shown(coding), wanted="0 or 1")


def _is_count(value: Any) -> bool:
    """A plain integer from 0: for Python, True and 1.0 equal 1, for other readers they do not."""
    return type(value) is int and value >= 0


def _shown(value: Any) -> str:
    return ascii(value)[:120]


def entries(rows: list[list[Any]], scales: np.ndarray[Any, np.dtype[np.float32]]) -> list[Entry]:
    """Rows and their scales as records with the ranges they own in the planes. Rules C3."""
    made = []
    plane_start = sign_start = 0
    for row, scale in zip(rows, scales.tolist(), strict=True):
        name, dtype, shape, kept, plane_bytes, coding, init = row
        entry = Entry(name, dtype, tuple(shape), kept, plane_bytes, coding, init, scale, plane_start, sign_start)
        _check_entry(entry)
        made.append(entry)
        plane_start += plane_bytes
        sign_start += (kept + 7) // 8
    return made


def _check_entry(entry: Entry) -> None:
    size, kept = entry.size, entry.kept
    if kept > size:
        refuse("C3.count", entry.name, met=kept, wanted=f"at most {size}")
    fewest = most = (size + 7) // 8
    if entry.coding == GAP8:
        fewest, most = kept, kept + size // 255
    if not fewest <= entry.plane_bytes <= most:
        refuse("C3.plane", entry.name, met=entry.plane_bytes, wanted=f"{fewest} to {most} bytes")
    rounded = float(round_scale(np.float32(entry.scale), entry.dtype))
    if not np.isfinite(entry.scale) or not np.isfinite(rounded):
        refuse("C3.finite", entry.name, met=f"{entry.scale} as {entry.dtype}", wanted="a finite scale")
    if entry.scale < 0:
        refuse("C3.negative", entry.name, met=entry.scale, wanted="a scale from 0")
    if kept and rounded == 0:
        refuse("C3.zero", entry.name, met=f"{entry.scale} as {entry.dtype}", wanted="a scale above 0")
