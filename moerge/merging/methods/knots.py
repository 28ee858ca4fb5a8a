"""KnOTS: bring all experts into one basis of output directions, and merge their coordinates there.

U S [V_1^T .. V_T^T] = svd([D_1 .. D_T]) gives every expert the coordinates X_t = U^T D_t. They are merged as TIES, DARE
or a sum would merge deltas, ranked over the whole expert as in the authors' code, and brought back by U.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import factors, noise, parts, selection
from moerge.merging.base import Parameters, Spec, choice, number, scale
from moerge.merging.sources import Block, Delta, Factors, Source, Stream

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

SPEC = Spec(
    name="knots",
    title="KnOTS",
    form="whole",
    rank_rule="sum",
    summary="Experts aligned by the SVD of all deltas side by side, then merged in those coordinates.",
    when="LoRA experts that TIES merges badly because their deltas hardly share coordinates.",
    paper="arXiv 2410.19735",
    is_random=True,
    parameters=(
        choice(
            "inner",
            ["ties", "dare", "sum"],
            default="ties",
            help="How coordinates are merged: by elected signs (TIES), after dropping at random (DARE), or added.",
        ),
        number(
            "density",
            default=1.0,
            minimum=0.0,
            above=True,
            maximum=1.0,
            help="Share of coordinates that TIES keeps, ranked over all tensors of an expert, or that DARE keeps.",
        ),
        choice(
            "aggregate", ["mean", "sum"], default="mean", help="What TIES takes of the coordinates that agree in sign."
        ),
        scale(),
    ),
)
# Directions below this share of the largest are rounding. The authors cut at 1e-5 itself, which empties small deltas.
_SMALLEST = 1e-5


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """Yield every tensor: of factors again factors, of at most the total rank; what is no matrix is merged as it is."""
    shapes: dict[str, tuple[int, ...]] = {}
    projected: dict[str, list[Float64 | None]] = {}
    for name in stream.names:
        # Coordinates of the experts' own factors are small enough to keep for all tensors; U is not.
        projected[name], rank = _projected(stream, name)
        shapes[name] = (rank, stream.shapes[name][1]) if rank else stream.shapes[name]
    aligned = replace(
        stream,
        sources=tuple(
            replace(source, tensors=_Aligned(source, place, projected), shapes=shapes)
            for place, source in enumerate(stream.sources)
        ),
    )
    cuts = _cuts(aligned, parameters)
    zero = _majority(aligned, cuts) if parameters.inner == "ties" else 1
    for name in stream.names:
        merged = aligned.map_blocks(name, lambda block: _merged(block, cuts, zero, parameters))
        yield name, _expanded(stream, name, merged)


def _expanded(stream: Stream, name: str, merged: Array) -> Delta:
    if len(stream.shapes[name]) != 2:
        return merged
    deltas = stream.deltas(name)
    found = Factors(_basis(deltas), merged)
    return found if all(isinstance(delta, Factors) for delta in deltas if delta is not None) else found.delta()


class _Aligned(Mapping[str, Delta]):
    """One expert's tensors in the common basis, made when read."""

    def __init__(self, source: Source, place: int, projected: dict[str, list[Float64 | None]]) -> None:
        self._source, self._place, self._projected = source, place, projected

    def __getitem__(self, name: str) -> Delta:
        delta, left = self._source.read(name), self._projected[name][self._place]
        if left is None:
            return delta.delta() if isinstance(delta, Factors) else delta
        if isinstance(delta, Factors):
            return Factors(left, delta.A.astype(np.float64))
        return np.asarray(left @ delta)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor to see whether it is there.
        return name in self._source.tensors


def _projected(stream: Stream, name: str) -> tuple[list[Float64 | None], int]:
    """What stands left of each expert's A, U^T B_t, or of its dense delta, U^T; and the rank of the common basis.

    Tensors that are not matrices have no basis and rank 0.
    """
    if len(stream.shapes[name]) != 2:
        return [None] * len(stream.sources), 0
    deltas = [source.read(name) if name in source.tensors else None for source in stream.sources]
    basis = _basis(deltas)
    left = [None if delta is None else basis.T @ delta.B if isinstance(delta, Factors) else basis.T for delta in deltas]
    return left, basis.shape[1]


def _basis(deltas: Sequence[Delta | None]) -> Float64:
    """The left singular vectors of all deltas side by side, (d_out, rank), each with its largest entry positive."""
    present = [delta for delta in deltas if delta is not None]
    low = [delta for delta in present if isinstance(delta, Factors)]
    found = factors.left_directions(low) if len(low) == len(present) else None
    if found is not None:
        U, S = found
    elif len(low) == len(present):
        # D_t = Q R_t L_t^T P_t^T with A_t^T = P_t L_t and P_t orthonormal, so the R x R blocks R_t L_t^T hold U and S.
        Q, R = np.linalg.qr(np.concatenate([delta.B.astype(np.float64) for delta in low], axis=1))
        ends = np.cumsum([delta.rank for delta in low])[:-1]
        blocks = [
            part @ _triangle(delta.A.T.astype(np.float64)).T
            for part, delta in zip(np.split(R, ends, axis=1), low, strict=True)
        ]
        U, S, _ = np.linalg.svd(np.concatenate(blocks, axis=1), full_matrices=False)
        U = Q @ U
    else:
        rows = np.zeros((0, present[0].shape[0]))
        for delta in present:
            whole = delta.delta() if isinstance(delta, Factors) else delta
            rows = _triangle(np.concatenate([rows, whole.T.astype(np.float64)]))
        _, S, Vt = np.linalg.svd(rows, full_matrices=False)
        U = Vt.T
    kept = U[:, : max(1, factors.count_above(S, _SMALLEST * S.max(initial=0.0)))]
    # The sign of a singular vector is arbitrary, and where votes cancel it would decide.
    largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=0)[None], axis=0)
    return np.asarray(kept * np.where(largest < 0, -1.0, 1.0))


def _triangle(matrix: Float64) -> Float64:
    return np.asarray(np.linalg.qr(matrix)[1])


def _cuts(aligned: Stream, parameters: Parameters) -> selection.Cuts:
    if parameters.inner == "ties":
        return selection.cuts(aligned, density=parameters.density, scope="global", release=True)
    return {}


def _majority(aligned: Stream, cuts: selection.Cuts) -> int:
    """The sign of the sum of all elected signs, which is given to votes that cancel; plus when that is zero too."""

    def count(block: Block) -> int:
        return int(parts.elect_signs(selection.trim(block, cuts), zero=0).sum(dtype=np.float64))

    votes = sum(value for name in aligned.names for _, value in aligned.over_blocks(name, count))
    return -1 if votes < 0 else 1


def _merged(block: Block, cuts: selection.Cuts, zero: int, parameters: Parameters) -> Array:
    """(experts, values) -> (values,)."""
    if parameters.inner == "ties":
        trimmed = selection.trim(block, cuts)
        agreeing = parts.agree(trimmed, parts.elect_signs(trimmed, zero=zero))
        merged = parts.weighted_total(trimmed * agreeing, block.weights)
        if parameters.aggregate == "mean":
            merged = parts.divide(merged, parts.weight_of(agreeing, np.ones(len(agreeing), merged.dtype)))
    else:
        kept = block.values
        if parameters.inner == "dare":
            kept = kept / kept.dtype.type(parameters.density)
            for row in range(len(kept)):
                kept[row] *= noise.keep(block.noise(row), parameters.density)
        merged = parts.weighted_total(kept, block.weights)
    return np.asarray(merged * merged.dtype.type(parameters.scale))
