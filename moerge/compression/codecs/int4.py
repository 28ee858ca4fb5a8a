"""The safe tier: four bits a value and one scale per row, for accuracy untouched at about a quarter of bfloat16.

Container `int4/1`: safetensors with the planes `manifest` (zlib stream of JSON rows `[name, dtype, shape, init]`),
`scales` (bfloat16, one per row of an entry, along its first dimension), `codes` (two values a byte, the first in the
low half, each entry padded to a byte with a zero half; a code is the value plus 8) and `codes_len`. `codes` is cut and
deflated like the positions of `compeft/1`. Rounding to the largest magnitude of each row is the vector-wise
quantisation of arXiv 2208.07339, here with four bits.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from moerge.compression import manifest, presets, selection
from moerge.compression.arithmetic import NUMPY, Arithmetic
from moerge.compression.base import Spec, Tensors
from moerge.compression.container import Container, Initial, start_of
from moerge.compression.differences import Arrays, TensorSource, difference, init_of
from moerge.compression.manifest import Budget
from moerge.compression.planes import PIECE_BYTES, UInt8
from moerge.compression.presets import Settings
from moerge.compression.report import Ledger
from moerge.compression.rules import refuse
from moerge.compression.shell import Cursor, Pieces, Shell
from moerge.compression.source import Source, open_source
from moerge.compression.ternary import largest, smallest
from moerge.compression.writer import WRITER, Spool, Written, deflated, finish, shell_bound
from moerge.tensors import files
from moerge.tensors.files import BF16, Array, Float32
from moerge.tensors.header import ITEM_BYTES

SPEC = Spec(
    name="int4",
    version="1",
    title="int4 (safe tier)",
    paper="2208.07339",
    parameters=(),
)
FORMAT, VERSION = "int4", "1"
_LAYOUT = {"manifest": "U8", "scales": "BF16", "codes": "U8", "codes_len": "I64"}
_MOST = 7  # codes 1..15 stand for -7..7, so that a tensor and its negative lose the same
_ZERO = 8
_WINDOW = 1 << 18


def settings(parameters: Mapping[str, object]) -> Settings:
    """Parameters as settings; nothing is left to choose. Raises ParameterInvalid."""
    SPEC.parse(parameters)
    return Settings(preset=SPEC.name, density=1.0, scale_rule="row", lone_rule=None, alpha=None)


def encode(
    tensors: Tensors,
    parameters: Mapping[str, object],
    *,
    initial: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Tensors as the bytes of an `int4/1` file; which of them are encoded is decided as in `compeft`."""
    stream = io.BytesIO()
    write(stream, Arrays(tensors), tensors, settings(parameters), initial=initial or {}, metadata=metadata or {})
    return stream.getvalue()


def decode(
    data: bytes,
    *,
    initial: Initial | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
) -> dict[str, Array | BF16]:
    """All tensors of a file, in their own dtypes. Raises EncodedInvalid, and never returns a part."""
    with open_quantised(data, budget=budget) as quantised:
        decoded = dict(quantised.walk(initial))
        decoded |= {name: quantised.tensor(name) for name in quantised.plain}
    return dict(sorted(decoded.items()))


def size_bound(
    tensors: Tensors,
    parameters: Mapping[str, object],
    *,
    initial: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Bytes that `encode` never exceeds for tensors of these names, shapes and dtypes, whatever their values."""
    wanted = settings(parameters)
    source = Arrays(tensors)
    names = presets.chosen(source, wanted.preset, initial or {})
    claims = {name: source.claim(name) for name in tensors}
    rows = [[name, *claims[name], "base"] for name in names]
    codes = sum((prod(claims[name][1]) + 1) // 2 for name in names)
    count = sum(_rows(claims[name][1]) for name in names)
    plain = sum(prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in claims.items() if name not in names)
    return shell_bound(claims, rows, metadata or {}) + 2 * count + codes + 8 * -(-codes // PIECE_BYTES) + plain


# Two threads of BLAS on small matrices fight for a busy machine's cores, and another order of sums is another file.
@threadpool_limits.wrap(limits=1, user_api="blas")  # type: ignore[untyped-decorator]
def write(
    stream: BinaryIO,
    source: TensorSource,
    tensors: Mapping[str, files.Tensor],
    wanted: Settings,
    *,
    initial: Mapping[str, Any],
    metadata: Mapping[str, str],
    arithmetic: Arithmetic = NUMPY,
    progress: Callable[[float], None] | None = None,
) -> tuple[Written, Ledger]:
    """Encode what `source` reads, one LoRA pair at a time; `tensors` are the same tensors as they stay when plain."""
    names = presets.chosen(source, wanted.preset, initial)
    ledger = Ledger()
    with Spool() as codes, Spool() as packed:
        kept = list(_encoded(source, names, codes, ledger, arithmetic))
        claims = {name: source.claim(name) for name in names}
        rows = [[name, dtype, list(shape), init_of(names[name])] for name, (dtype, shape) in claims.items()]
        text, small = manifest.pack(rows)
        scale_bits = np.concatenate([np.empty(0, np.uint16), *kept])
        digest = hashlib.sha256(text + scale_bits.tobytes())
        lengths = deflated(codes, packed, digest, progress)
        own: dict[str, files.Tensor] = {
            "manifest": np.frombuffer(small, np.uint8),
            "scales": BF16(scale_bits),
            "codes": packed.streamed(),
            "codes_len": lengths,
        }
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "preset": wanted.preset,
            "writer": WRITER,
            "n_params": str(sum(prod(shape) for _, shape in claims.values())),
            "planes_sha256": digest.hexdigest(),
        }
        plain = {name: tensor for name, tensor in tensors.items() if name not in names}
        return finish(stream, own, plain=plain, metadata={**metadata, **facts}), ledger


def _rows(shape: tuple[int, ...]) -> int:
    """How many scales a tensor has: one per index of its first dimension; a vector has one."""
    return 0 if 0 in shape else shape[0] if len(shape) > 1 else 1


def _encoded(
    source: TensorSource, names: Mapping[str, Any], codes: Spool, ledger: Ledger, arithmetic: Arithmetic
) -> Iterator[files.UInt16]:
    """Each tensor's scales, in the order of the names; its codes go to the spool, its loss into the ledger."""
    partners = selection.factors(source.names())
    waiting: dict[str, tuple[Float32, Float32]] = {}
    for name in names:
        values = difference(source, name, names[name])
        dtype, _ = source.claim(name)
        steps, bits = _quantise(values, dtype)
        seen = steps * files.from_bf16(bits)[:, None]
        halves = np.append(steps + _ZERO, np.zeros(steps.size % 2)).astype(np.uint8)
        codes.append((halves[::2] | halves[1::2] << 4).data)
        inner = _inner(values, values), _inner(values, seen), _inner(seen, seen)
        ledger.add_tensor(name, dtype, size=values.size, kept=values.size, scale=None, inner=inner)
        partner = partners.get(name)
        if partner in waiting:
            _note(ledger, arithmetic, (partner or "", *waiting.pop(partner or "")), (name, values, seen))
        elif partner in names:
            waiting[name] = values, seen
        yield bits


def _note(
    ledger: Ledger, arithmetic: Arithmetic, one: tuple[str, Float32, Float32], other: tuple[str, Float32, Float32]
) -> None:
    """The loss of a LoRA pair."""
    (name, A, A_seen), (_, B, B_seen) = (one, other) if selection.is_first(one[0]) else (other, one)
    wide, tall = (A.shape[0], -1), (-1, A.shape[0])
    moments = arithmetic.product(A.reshape(wide), B.reshape(tall), A_seen.reshape(wide), B_seen.reshape(tall))
    sigmas = ledger.add_spread("A", A), ledger.add_spread("B", B)
    ledger.add_module(selection.module_of(name), moments, factor=1.0, sigmas=sigmas)


def _inner(one: Float32, other: Float32) -> float:
    pairs = zip(selection.parts(one), selection.parts(other), strict=True)
    return sum(float(np.dot(left.astype(np.float64), right.astype(np.float64))) for left, right in pairs)


def _quantise(values: Float32, dtype: str) -> tuple[Float32, files.UInt16]:
    """Steps -7..7 of shape (rows, row length) and the bits of each row's bfloat16 scale.

    The scale is rounded before the steps are found, and downwards where 7 of it would leave the dtype's range.
    """
    rows = values.reshape(_rows(values.shape), -1) if values.size else values.reshape(0, 1)
    most = np.abs(rows).max(axis=1, initial=0)
    bits = files.to_bf16(most / _MOST)
    bits[_MOST * files.from_bf16(bits) > largest(dtype)] -= 1
    bits[(most > 0) & (files.from_bf16(bits) < smallest(dtype))] = files.to_bf16(np.float32(smallest(dtype)).reshape(1))
    step = files.from_bf16(bits)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.where(most[:, None] > 0, np.rint(rows / step[:, None]), 0)
    return np.clip(steps, -_MOST, _MOST).astype(np.float32), bits


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `start` counts bytes of the decoded codes, `first` the rows before it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    init: int | str
    start: int
    first: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def code_bytes(self) -> int:
        return (self.size + 1) // 2


class Quantised(Container[Entry]):
    """An open `int4/1` file whose claims have been checked (rules 1 to 4)."""

    def __init__(
        self,
        source: Source,
        *,
        budget: Budget = Budget(),  # noqa: B008 - frozen record
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(Shell(source, name=f"{FORMAT}/{VERSION}", layout=_LAYOUT, budget=budget))
        rows = manifest.parse(self._manifest, budget=budget, taken=frozenset(self.plain), expected=expected,
                              check_rest=_check_length)  # fmt: skip
        found = []
        start = first = 0
        for name, dtype, shape, init in rows:
            entry = Entry(name, dtype, tuple(shape), init, start, first)
            found.append(entry)
            start += entry.code_bytes
            first += _rows(entry.shape)
        self.entries = {entry.name: entry for entry in found}
        if self._shell.info("scales").size != first:
            refuse("C3.scales", "scales", met=self._shell.info("scales").size, wanted=first)
        self._steps = files.from_bf16(np.frombuffer(self._scales, "<u2"))
        for entry in found:
            self._check_scales(entry)
        self._pieces = Pieces(self._shell, "codes", "codes_len", total=start)

    def _check_scales(self, entry: Entry) -> None:
        steps = self._steps[entry.first : entry.first + _rows(entry.shape)]
        if (steps < 0).any():
            refuse("C3.negative", entry.name, met=float(steps.min()), wanted="scales from 0")
        if not (_MOST * steps.astype(np.float64) <= largest(entry.dtype)).all():
            refuse("C3.finite", entry.name, met=f"{steps.max()} as {entry.dtype}", wanted="7 times a scale finite")

    def _check(self, entry: Entry, cursor: Cursor) -> None:
        for _ in _steps(entry, cursor):
            pass

    def _decode(self, entry: Entry, cursor: Cursor, initial: Initial | None) -> Array | BF16:
        base = start_of(entry.name, entry.dtype, entry.shape, initial) if entry.init == "base" else None
        out = np.zeros(entry.shape, files.NUMPY[entry.dtype]) if base is None else base
        flat = out.reshape(-1)
        length = entry.size // max(1, _rows(entry.shape))
        for start, steps in _steps(entry, cursor):
            part = slice(start, start + steps.size)
            row = entry.first + np.arange(part.start, part.stop) // max(1, length)
            values = steps * self._steps[row]
            if base is not None:
                values += files.from_bf16(flat[part]) if entry.dtype == "BF16" else flat[part].astype(np.float32)
            elif entry.init:
                values += np.float32(entry.init)
            with np.errstate(over="ignore"):
                made = files.to_dtype(values, entry.dtype)
            flat[part] = made.bits if isinstance(made, BF16) else made
        return BF16(out) if entry.dtype == "BF16" else out


def open_quantised(
    data: bytes | bytearray | memoryview | str | Path,
    *,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> Quantised:
    """Open an `int4/1` file from memory or disk and check rules 1 to 4. Raises EncodedInvalid, OSError."""
    source = open_source(data)
    try:
        return Quantised(source, budget=budget, expected=expected)
    except BaseException:
        source.close()
        raise


def _check_length(row: Any, where: str) -> None:
    manifest.check_length(row, where, fields=4)


def _steps(entry: Entry, cursor: Cursor) -> Iterator[tuple[int, Float32]]:
    """(flat index of the first, values -7..7) window by window. Rules C4.padding and C6.code."""
    done = 0
    for chunk in cursor.chunks(entry.start, entry.code_bytes):
        for at in range(0, chunk.size, _WINDOW):
            codes = _halves(chunk[at : at + _WINDOW])
            left = entry.size - done
            if codes.size > left:
                if codes[left]:
                    refuse("C4.padding", entry.name, met=f"{codes[left]} behind the last value", wanted="zero")
                codes = codes[:left]
            if not codes.all():
                refuse("C6.code", entry.name, met="the code 0", wanted="1 to 15")
            yield done, codes.astype(np.float32) - np.float32(_ZERO)
            done += codes.size


def _halves(data: UInt8) -> UInt8:
    out = np.empty(2 * data.size, np.uint8)
    out[::2], out[1::2] = data & 15, data >> 4
    return out
