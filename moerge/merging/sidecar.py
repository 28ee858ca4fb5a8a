"""`stats.safetensors`: statistics of an expert in a file beside its adapter, read one module at a time.

A tensor is called `<module>.<kind>` or `<module>.<kind>.<part>`, the module by its path in the adapter:

fisher_diag            (d_out, d_in); or .rows (d_out,) and .columns (d_in,), whose product it is
gram_in, gram_out      (d, d); or .vectors (k, d), .values (k,) and .rest (d,), as moerge.merging.statistics.Gram
loss, coefficients     one number each; under the kind alone for the expert as a whole

The metadata says `kinds` (by comma), `examples`, `tokens`, `label_policy` (true: labels drawn from the model itself, or
empirical: those of the data), and may say `dataset_digest` and `base_digest`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.errors import StatisticsInvalid
from moerge.merging.coefficients import WHOLE
from moerge.merging.sources import Factors
from moerge.merging.statistics import Gram, Statistics
from moerge.tensors import files
from moerge.tensors.header import Header, TensorInfo

Array = npt.NDArray[Any]

FILE = "stats.safetensors"
MATRICES = {"fisher_diag": ("rows", "columns"), "gram_in": ("vectors", "values", "rest")}
MATRICES["gram_out"] = MATRICES["gram_in"]
NUMBERS = ("loss", "coefficients")
KINDS = (*MATRICES, *NUMBERS)
DIRECTIONS = 128
# A whole Gram matrix is read at once; a larger one comes as few directions.
LARGEST_GRAM = 1 << 26
_LABELLED = ("fisher_diag", "gram_out")
_POLICIES = ("true", "empirical")
# Rounding to float16 may differ by this share of the largest value on the two sides of the diagonal.
_ASYMMETRY = 1e-3
_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class About:
    """What statistics were gathered on."""

    examples: int
    tokens: int | None = None
    label_policy: str | None = None
    dataset_digest: str | None = None
    base_digest: str | None = None


@dataclass(frozen=True)
class _Entry:
    """The tensors of one kind of one module, by part; the part of a tensor that is whole is empty."""

    kind: str
    module: str
    parts: dict[str, TensorInfo]


def kinds(header: Header) -> tuple[str, ...]:
    """The kinds of statistics that a file holds, sorted. Raises StatisticsInvalid where a tensor has no place."""
    return tuple(sorted({entry.kind for entry in _entries(header)}))


def check(
    header: Header,
    *,
    modules: Collection[str] | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> About:
    """What can be said by the header alone: every tensor has a place and a shape that fits, and the metadata agrees.

    `modules` are those of the adapter and `shapes` their (d_out, d_in), as far as known. Raises StatisticsInvalid.
    """
    entries = _entries(header)
    for entry in entries:
        if modules is not None and entry.module != WHOLE and entry.module not in modules:
            raise _invalid(f"The adapter has no module {entry.module}", entry, entry.module, "a module of the adapter")
        _check_shapes(entry, (shapes or {}).get(entry.module))
    return _about(header.metadata, {entry.kind for entry in entries})


def verify(path: str | Path, header: Header | None = None) -> None:
    """Look at every value: finite, information not below zero, Gram matrices symmetric without negative directions.

    Raises StatisticsInvalid naming the tensor.
    """
    with files.open_file(path, known=header) as file:
        for entry in _entries(file.header):
            for part, info in entry.parts.items():
                _check_values(entry, part, info, file)
            if entry.kind.startswith("gram"):
                _check_gram(entry, _read(file, entry))


def load(path: str | Path) -> Statistics:
    """Statistics by kind and tensor name; each look-up reads the tensors of that one module.

    Raises StatisticsInvalid where the file breaks a rule that its header can break, HeaderInvalid, OSError.
    """
    path = Path(path)
    with files.open_file(path) as file:
        header = file.header
    check(header)
    found: dict[str, dict[str, _Entry]] = {}
    for entry in _entries(header):
        found.setdefault(entry.kind, {})[entry.module] = entry
    return {kind: _OfKind(path, header, dict(sorted(entries.items()))) for kind, entries in sorted(found.items())}


def save(path: str | Path, statistics: Statistics, *, about: About) -> None:
    """Write statistics for `load`; arrays keep their dtype. Raises StatisticsInvalid for what `load` would refuse."""
    tensors: dict[str, files.Tensor] = {}
    for kind, given in statistics.items():
        for module, values in given.items():
            if kind in NUMBERS:
                tensors[kind if module == WHOLE else f"{module}.{kind}"] = np.array(values, dtype=np.float64)
            else:
                tensors |= {f"{module}.{kind}{ending}": part for ending, part in _parts_of(values)}
    given_of = {"kinds": ",".join(sorted(statistics))} | {
        name: str(value) for name, value in vars(about).items() if value is not None
    }
    files.write(path, tensors, given_of)
    with files.open_file(path) as file:
        check(file.header)
    verify(path, file.header)


def compact_fisher(fisher: Array) -> Factors:
    """Information (d_out, d_in) as row means times column means over the mean: the same sums along both sides."""
    rows, columns = fisher.mean(axis=1, dtype=np.float64), fisher.mean(axis=0, dtype=np.float64)
    columns /= rows.mean() or 1.0
    return Factors(rows.astype(np.float32)[:, None], columns.astype(np.float32)[None])


def compact_gram(gram: Array, *, directions: int = DIRECTIONS) -> Gram:
    """A Gram matrix (d, d) as its leading eigenpairs, in float16, and the remainder of its diagonal.

    About 1 MiB for 128 directions of 4096. Many directions are found exactly, few by subspace iteration.
    """
    size = len(gram)
    k = min(directions, size)
    if 2 * k >= size:
        basis = np.eye(size, dtype=np.float64)
    else:
        basis = np.random.default_rng(0).standard_normal((size, 2 * k))
        for _ in range(_STEPS):
            basis = np.linalg.qr(gram @ basis)[0]
    values, inner = np.linalg.eigh(basis.T @ (gram @ basis))
    vectors = (basis @ inner[:, ::-1][:, :k]).T.astype(np.float16)
    leading = np.maximum(values[::-1][:k], 0).astype(np.float32)
    # Taken from what is stored, so that the diagonal stays as it was within the rounding of the directions.
    covered = leading.astype(np.float64) @ np.square(vectors.astype(np.float64))
    return Gram(vectors, leading, np.maximum(gram.diagonal() - covered, 0).astype(np.float32))


class _OfKind(Mapping[str, Any]):
    """Module name -> one kind of its statistics, read when it is looked up."""

    def __init__(self, path: Path, header: Header, entries: Mapping[str, _Entry]) -> None:
        self._path, self._header, self._entries = path, header, entries

    def __getitem__(self, module: str) -> Any:
        entry = self._entries[module]
        with files.open_file(self._path, known=self._header) as file:
            return _read(file, entry)

    def __contains__(self, module: object) -> bool:
        # Mapping's own would read the module to see whether it is there.
        return module in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _entries(header: Header) -> list[_Entry]:
    """Every module and kind of a file with its tensors; a form that lacks a part is refused."""
    found: dict[tuple[str, str], _Entry] = {}
    for name, info in sorted(header.tensors.items()):
        module, kind, part = _place(name)
        found.setdefault((kind, module), _Entry(kind, module, {})).parts[part] = info
    for entry in found.values():
        if set(entry.parts) not in ({""}, set(MATRICES.get(entry.kind, ("",)))):
            wanted = " and ".join(MATRICES.get(entry.kind, ()))
            raise _invalid(
                f"{entry.kind} of {entry.module} is neither whole nor in all its parts",
                entry,
                ", ".join(sorted(entry.parts)),
                f"one tensor, or {wanted}",
            )
    return list(found.values())


def _place(name: str) -> tuple[str, str, str]:
    """Module, kind and part that a tensor's name says."""
    if name in NUMBERS:
        return WHOLE, name, ""
    for kind in KINDS:
        for part in ("", *MATRICES.get(kind, ())):
            ending = f".{kind}.{part}" if part else f".{kind}"
            if name.endswith(ending) and len(name) > len(ending):
                return name.removesuffix(ending), kind, part
    raise StatisticsInvalid(
        f"No kind of statistics is called as {name} says.",
        pointer=name,
        met=name,
        wanted="<module>.<kind>, the kind one of " + ", ".join(KINDS),
        remedy="Name every tensor by a module of the adapter and a kind.",
    )


def _check_shapes(entry: _Entry, shape: tuple[int, int] | None) -> None:
    """Raise StatisticsInvalid where shapes do not fit each other, or the module's (d_out, d_in) where that is known."""
    met = {part: info.shape for part, info in entry.parts.items()}
    last = {part: found[-1] if found else 0 for part, found in met.items()}
    if entry.kind in NUMBERS:
        is_right, wanted = met[""] in ((), (1,)), "one number"
    elif entry.kind == "fisher_diag":
        sides = shape or met.get("", (last.get("rows", 0), last.get("columns", 0)))
        is_right = len(sides) == 2 and met in ({"": sides}, {"rows": sides[:1], "columns": sides[1:]})
        wanted = f"{list(sides)} or two parts, rows {list(sides[:1])} and columns {list(sides[1:])}"
    else:
        side = shape[entry.kind == "gram_in"] if shape else last.get("", last.get("rest", 0))
        k = last.get("values", 0)
        is_few = met == {"vectors": (k, side), "values": (k,), "rest": (side,)} and k <= side
        is_right = is_few or (met == {"": (side, side)} and side * side <= LARGEST_GRAM)
        wanted = f"[{side}, {side}] of at most {LARGEST_GRAM} values, or vectors [k, {side}], values [k], rest [{side}]"
    if not is_right:
        shown = ", ".join(f"{part} {list(found)}".strip() for part, found in sorted(met.items()))
        raise _invalid(f"{entry.kind} of {entry.module} has the wrong shape", entry, shown, wanted)


def _about(metadata: Mapping[str, str], present: set[str]) -> About:
    named = sorted(name.strip() for name in metadata.get("kinds", "").split(","))
    if named != sorted(present):
        raise _wrong_metadata("kinds", metadata.get("kinds"), ",".join(sorted(present)) + ", as the tensors say")
    needs_tokens = any(kind.startswith("gram") for kind in present)
    return About(
        examples=_count(metadata, "examples", is_needed=True) or 0,
        tokens=_count(metadata, "tokens", is_needed=needs_tokens),
        label_policy=_text(metadata, "label_policy", "true|empirical", is_needed=bool(present & {*_LABELLED})),
        dataset_digest=_text(metadata, "dataset_digest", "[0-9a-f]{64}"),
        base_digest=_text(metadata, "base_digest", "[0-9a-f]{64}"),
    )


def _count(metadata: Mapping[str, str], name: str, *, is_needed: bool) -> int | None:
    given = _text(metadata, name, "[1-9][0-9]{0,14}", is_needed=is_needed)
    return None if given is None else int(given)


def _text(metadata: Mapping[str, str], name: str, pattern: str, *, is_needed: bool = False) -> str | None:
    given = metadata.get(name)
    if given is None and not is_needed:
        return None
    if given is None or not re.fullmatch(pattern, given):
        raise _wrong_metadata(name, given, pattern)
    return given


def _read(file: files.SafetensorsFile, entry: _Entry) -> Any:
    """One kind of one module in the form that methods take; float64 where it is stored so, else float32."""
    parts = {part: _floats(file, info) for part, info in entry.parts.items()}
    if entry.kind in NUMBERS:
        return float(parts[""].reshape(()))
    if "" in parts:
        return parts[""]
    if entry.kind == "fisher_diag":
        return Factors(parts["rows"][:, None], parts["columns"][None])
    return Gram(parts["vectors"], parts["values"], parts["rest"])


def _floats(file: files.SafetensorsFile, info: TensorInfo) -> Array:
    return file.array(info.name) if info.dtype == "F64" else file.float32(info.name)


def _check_values(entry: _Entry, part: str, info: TensorInfo, file: files.SafetensorsFile) -> None:
    """One tensor block by block: finite, and no negative information or curvature."""
    must_be_positive = entry.kind == "fisher_diag" or part == "values"
    for block in files.float32_blocks(file, info.name):
        if not np.isfinite(block).all():
            raise _invalid(f"{info.name} holds a value that is not finite", entry, "NaN or infinity", "finite values")
        if must_be_positive and (block < 0).any():
            raise _invalid(
                f"{info.name} holds a mean square below zero", entry, float(block.min()), "values of zero or more"
            )


def _check_gram(entry: _Entry, gram: Any) -> None:
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        raise _invalid(
            f"The diagonal of {entry.kind} of {entry.module} goes below zero",
            entry,
            float(diagonal.min()),
            "a sum of squares",
        )
    if not isinstance(gram, Gram) and float(np.abs(gram - gram.T).max()) > _ASYMMETRY * float(diagonal.max()):
        raise _invalid(f"{entry.kind} of {entry.module} is not symmetric", entry, "two different halves", "X^T X")


def _parts_of(values: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(values, Gram):
        yield from ((".vectors", values.vectors), (".values", values.values), (".rest", values.rest))
    elif isinstance(values, Factors):
        yield from ((".rows", values.B[:, 0]), (".columns", values.A[0]))
    else:
        yield "", values


def _invalid(what: str, entry: _Entry, met: object, wanted: str) -> StatisticsInvalid:
    return StatisticsInvalid(
        f"{what}: met {met}, wanted {wanted}.",
        pointer=next(iter(entry.parts.values())).name,
        met=met,
        wanted=wanted,
        remedy="Gather the statistics anew on this adapter, or leave them out.",
    )


def _wrong_metadata(name: str, met: str | None, wanted: str) -> StatisticsInvalid:
    return StatisticsInvalid(
        f"The metadata says {name} {met!r}, wanted {wanted}.",
        pointer=f"__metadata__/{name}",
        met=met,
        wanted=wanted,
        remedy=f"Write {name} into the metadata of {FILE}.",
    )
