"""What the experts bring: deltas per tensor, as arrays or as factors, read in blocks of whole rows.

Products of factors are always formed in tiles of a grid that depends on the tensor's shape alone. BLAS rounds
differently for different shapes, so this is what makes every value the same however large a block is and whoever
computes it. Blocks are made of whole tiles.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from moerge.errors import ExpertsIncompatible
from moerge.merging import noise
from moerge.merging.compiled import Kernels, kernels

Array = npt.NDArray[Any]
Result = TypeVar("Result")

# 16 rows of a 4096 wide matrix: large enough for BLAS, small enough that a block of several experts stays in cache.
TILE_VALUES = 1 << 16
_TELLING = 0.01
# Values of a stored delta that are read together for a sample.
_SAMPLED_RUN = 512


@runtime_checkable
class LowRank(Protocol):
    """A delta `scaling * B @ A`, A (rank, d_in), B (d_out, rank): what moerge.tensors.adapters.load gives."""

    @property
    def A(self) -> Array: ...  # noqa: N802  Matrices are named as in the papers.
    @property
    def B(self) -> Array: ...  # noqa: N802
    @property
    def scaling(self) -> float: ...


class Factors(NamedTuple):
    """A delta B @ A with every scaling folded in, B (d_out, rank), A (rank, d_in)."""

    B: Array
    A: Array

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.B.shape[0]), int(self.A.shape[1])

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def delta(self) -> Array:
        """The dense delta, (d_out, d_in)."""
        return np.asarray(self.B @ self.A)


class Stored(ABC):
    """A dense float32 delta that is read in stretches, such as the difference of two checkpoints on disk."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...
    @abstractmethod
    def read(self, start: int, stop: int, *, out: Array) -> Array:
        """Values start .. stop of the flattened delta, into `out` (stop - start,)."""


Delta = Array | Factors
Given = Array | LowRank | Factors
# What blocks are read from: a delta in memory, or one that stays where it is.
Held = Delta | Stored


@dataclass(frozen=True, eq=False)
class Source:
    """One expert of a merge: its identity, its weight, and its delta per tensor name.

    `shapes`, where already known, spare a reading of every tensor. `statistics` are what is known of the expert beside
    its deltas, by kind and tensor name (see moerge.merging.statistics).
    """

    digest: str
    weight: float
    tensors: Mapping[str, Given | Stored]
    label: str = ""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def read(self, name: str) -> Delta:
        """The delta of one tensor; of factors with their scaling in A."""
        held = self.held(name)
        if isinstance(held, Stored):
            size = int(np.prod(held.shape, dtype=np.int64))
            return held.read(0, size, out=np.empty(size, dtype=np.float32)).reshape(held.shape)
        return held

    def held(self, name: str) -> Held:
        """The delta of one tensor as `read` gives it, but left where it is when it can be read in stretches."""
        given = self.tensors[name]
        if isinstance(given, Stored):
            return given
        if isinstance(given, np.ndarray):
            return given if given.dtype.kind == "f" and given.dtype.itemsize >= 4 else given.astype(np.float32)
        if isinstance(given, Factors):
            return given
        scaling = np.asarray(given.scaling, dtype=given.A.dtype)
        return Factors(np.ascontiguousarray(given.B), np.ascontiguousarray(given.A * scaling))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one delta."""
        return tuple(self.shapes[name] if self.shapes else self.held(name).shape)

    def __str__(self) -> str:
        return self.label or self.digest[:12]


@dataclass(frozen=True, eq=False)
class Block:
    """The same stretch of one tensor in every expert: `values` (experts, values), whole rows of `width` values.

    `offset` is the flat index of the first value, `size` the number of values of the whole tensor. `members` are
    the experts' positions in the recipe's canonical order; `weights` and `digests` are in the order of the rows.
    """

    name: str
    values: Array
    offset: int
    width: int
    size: int
    members: tuple[int, ...]
    weights: Array
    digests: tuple[str, ...]
    seed: int

    def noise(self, row: int) -> noise.Bits:
        """24 random bits per value for one expert, (values,)."""
        key = noise.key(self.seed, self.digests[row], self.name)
        return noise.stream(key, self.offset, self.values.shape[1])


def silent(_share: float) -> None:
    """Nobody watches."""


def never() -> bool:
    """Nobody stops it."""
    return False


@dataclass
class Watch:
    """Whoever waits for a merge: told the share that is done, asked whether to stop."""

    progress: Callable[[float], None] = silent
    cancelled: Callable[[], bool] = never
    expected: int = 1
    done: int = field(default=0, init=False)
    told: float = field(default=0.0, init=False)

    def step(self) -> None:
        """One block is done. Raises Cancelled when the merge is no longer wanted."""
        self.done += 1
        if self.cancelled():
            raise Cancelled
        share = min(0.99, self.done / max(self.expected, 1))
        # Whoever listens may write to a database, and a large merge has a hundred thousand blocks.
        if share - self.told >= _TELLING:
            self.told = share
            self.progress(share)


class Cancelled(Exception):
    """The one who asked for the merge no longer wants it."""


@dataclass(frozen=True, eq=False)
class Stream:
    """All tensors of all experts, in sorted-name order, as blocks."""

    sources: tuple[Source, ...]
    seed: int = 0
    missing: str = "zero"
    block_values: int = 1 << 17
    threads: int = 1
    watch: Watch = field(default_factory=Watch)
    compiled: bool | None = None

    @cached_property
    def kernels(self) -> Kernels | None:
        """The compiled loops, where they are wanted or worth it."""
        return kernels(len(self.sources) * sum(map(self.size, self.names)), wanted=self.compiled)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({name for source in self.sources for name in source.tensors}))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape. Raises ExpertsIncompatible when two experts disagree."""
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[str, Source] = {}
        for source in self.sources:
            for name in source.tensors:
                shape = source.shape(name)
                if shapes.setdefault(name, shape) != shape:
                    raise ExpertsIncompatible(
                        f"{name} has shape {list(shape)} in {source} and {list(shapes[name])} in {owners[name]}.",
                        pointer="/experts",
                        met=list(shape),
                        wanted=list(shapes[name]),
                        remedy="Merge experts that were trained on the same base model and vocabulary.",
                    )
                owners.setdefault(name, source)
        return shapes

    @property
    def weights(self) -> Array:
        return np.array([source.weight for source in self.sources], dtype=np.float64)

    def owners(self, name: str) -> tuple[int, ...]:
        """Positions of the experts that have this tensor."""
        return tuple(i for i, source in enumerate(self.sources) if name in source.tensors)

    def members(self, name: str) -> tuple[int, ...]:
        """Positions of the experts that take part in this tensor: all of them, or the owners with missing=skip."""
        return self.owners(name) if self.missing == "skip" else tuple(range(len(self.sources)))

    def size(self, name: str) -> int:
        return int(np.prod(self.shapes[name], dtype=np.int64))

    def width(self, name: str) -> int:
        """Values per row; a tensor of one dimension is a single row."""
        return int(self.shapes[name][-1]) if self.shapes[name] else 1

    def spans(self, name: str) -> list[tuple[int, int]]:
        """First and last row of each block."""
        rows = self.size(name) // max(self.width(name), 1)
        tile = tile_rows(self.width(name))
        step = tile * max(1, self.block_values // (tile * max(self.width(name), 1)))
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def blocks(self, name: str, expert: int) -> Iterator[tuple[int, Array]]:
        """The stretches of one tensor of one expert that has it, with the flat index each begins at."""
        delta = self.sources[expert].held(name)
        width = self.width(name)
        for first, last in self.spans(name):
            yield first * width, rows_of(delta, first, last)
            self.watch.step()

    def sample(self, name: str, expert: int, count: int) -> Array:
        """About `count` values of one tensor spread evenly over its rows and columns, cheap to make."""
        delta = self.sources[expert].held(name)
        if isinstance(delta, Stored):
            return _sample(delta, self.size(name), count)
        if isinstance(delta, Factors):
            side = max(1, int(np.sqrt(count)))
            rows = np.unique(np.linspace(0, delta.shape[0] - 1, min(side, delta.shape[0])).astype(np.intp))
            columns = np.unique(
                np.linspace(0, delta.shape[1] - 1, min(count // len(rows) + 1, delta.shape[1])).astype(np.intp)
            )
            return np.asarray(delta.B[rows] @ np.ascontiguousarray(delta.A[:, columns])).ravel()
        return delta.ravel()[:: max(1, delta.size // count)]

    def stretches(self, name: str) -> Iterator[tuple[int, Array]]:
        """The blocks of one tensor one by one, (members, values), with the flat index each begins at."""
        members = self.members(name)
        owners = [row for row, member in enumerate(members) if name in self.sources[member].tensors]
        for found in zip(*(self.blocks(name, members[row]) for row in owners), strict=True):
            offset, first = found[0]
            values = np.zeros((len(members), first.size), dtype=np.result_type(*(part.dtype for _, part in found)))
            for row, (_, part) in zip(owners, found, strict=True):
                values[row] = part
            yield offset, values

    def samples(self, name: str, count: int) -> Array:
        """About `count` values of one tensor of every member, (members, values); from the same places in deltas of one
        kind.
        """
        members = self.members(name)
        owners = [row for row, member in enumerate(members) if name in self.sources[member].tensors]
        found = [self.sample(name, members[row], count) for row in owners]
        values = np.zeros((len(members), min(part.size for part in found)), dtype=np.result_type(*found))
        for row, part in zip(owners, found, strict=True):
            values[row] = part[: values.shape[1]]
        return values

    def over_blocks(self, name: str, work: Callable[[Block], Result]) -> list[tuple[tuple[int, int], Result]]:
        """Call `work` on each block of a tensor, over all members; results in row order, with first and last row.

        With several threads as many blocks are in flight at a time, each computed alone, so results do not change.
        """
        return self._over(name, self.held(name), work)

    def map_blocks(self, name: str, work: Callable[[Block], Array]) -> Array:
        """What `work` makes of each block of a tensor, in the tensor's shape."""
        deltas = self.held(name)
        merged = np.empty(self.size(name), dtype=_common_dtype(deltas))

        def fill(block: Block) -> None:
            merged[block.offset : block.offset + block.values.shape[1]] = work(block)

        self._over(name, deltas, fill)
        return merged.reshape(self.shapes[name])

    def deltas(self, name: str) -> list[Delta | None]:
        """One tensor of every member; None where an expert does not have it."""
        sources = [self.sources[i] for i in self.members(name)]
        return [source.read(name) if name in source.tensors else None for source in sources]

    def held(self, name: str) -> list[Held | None]:
        """As `deltas`, but what can be read in stretches is left where it is."""
        sources = [self.sources[i] for i in self.members(name)]
        return [source.held(name) if name in source.tensors else None for source in sources]

    def _over(
        self, name: str, deltas: list[Held | None], work: Callable[[Block], Result]
    ) -> list[tuple[tuple[int, int], Result]]:
        members, dtype = self.members(name), _common_dtype(deltas)
        weights, digests = self.weights[list(members)], tuple(self.sources[i].digest for i in members)
        width, size = self.width(name), self.size(name)

        def one(span: tuple[int, int]) -> tuple[tuple[int, int], Result]:
            first, last = span
            values = np.empty((len(members), (last - first) * width), dtype=dtype)
            for row, delta in zip(values, deltas, strict=True):
                if delta is None:
                    row.fill(0)
                else:
                    rows_of(delta, first, last, out=row)
            result = work(Block(name, values, first * width, width, size, members, weights, digests, self.seed))
            self.watch.step()
            return span, result

        return run_all(one, self.spans(name), threads=self.threads)


def _sample(delta: Stored, size: int, count: int) -> Array:
    """Short runs of values at even distances, which cost as many reads as there are runs."""
    run = min(size, _SAMPLED_RUN)
    starts = np.unique(np.linspace(0, size - run, max(1, count // run)).astype(np.int64))
    found = np.empty((len(starts), run), dtype=np.float32)
    for start, row in zip(starts.tolist(), found, strict=True):
        delta.read(start, start + run, out=row)
    return found.ravel()


def _common_dtype(deltas: Sequence[Held | None]) -> np.dtype[Any]:
    return np.result_type(*(delta_dtype(delta) for delta in deltas if delta is not None))


def delta_dtype(delta: Held) -> np.dtype[Any]:
    """The dtype that blocks of this delta have."""
    if isinstance(delta, Stored):
        return np.dtype(np.float32)
    return np.result_type(delta.B, delta.A) if isinstance(delta, Factors) else delta.dtype


def tile_rows(width: int) -> int:
    """Rows of one tile of the grid on which products are formed."""
    return max(1, TILE_VALUES // max(width, 1))


def rows_of(delta: Held, first: int, last: int, *, out: Array | None = None) -> Array:
    """Rows first .. last of a delta, flat. `first` lies on the grid of tiles."""
    if isinstance(delta, Stored):
        width = delta.shape[-1] if delta.shape else 1
        if out is None:
            out = np.empty((last - first) * width, dtype=np.float32)
        return delta.read(first * width, last * width, out=out)
    if not isinstance(delta, Factors):
        flat = delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)[first:last].ravel()
        if out is None:
            return flat
        out[:] = flat
        return out
    width = delta.shape[1]
    if out is None:
        out = np.empty((last - first) * width, dtype=delta_dtype(delta))
    matrix = out.reshape(last - first, width)
    step = tile_rows(width)
    for start in range(first, last, step):
        stop = min(start + step, last)
        np.matmul(delta.B[start:stop], delta.A, out=matrix[start - first : stop - first])
    return out


def run_all(work: Callable[[Any], Result], items: Sequence[Any], *, threads: int) -> list[Result]:
    """Results of `work` over items, in order."""
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(work, items))
