"""What a merge will take, from shapes and ranks alone: memory, bytes written, arithmetic, seconds.

No numpy here: web processes tell costs before anything is computed, and workers refuse by the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from moerge.merging.base import Spec, output_rank
from moerge.merging.recipe import Output

Shape = tuple[int, int, int]

# The interpreter's arrays that do not grow with the merge: blocks, code of BLAS, headers.
FIXED_BYTES = 64 << 20
# A LoRA of more is loaded by hardly any server; where a share of energy decides, ranks of dense deltas end here.
HIGHEST_ENERGY_RANK = 512
TERNARY_DENSITY = 0.1
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What one core does in a second: multiplications and additions, values that a method looks at, bytes moved.
_FLOPS_PER_SECOND = 4e10
_VALUES_PER_SECOND = 2e8
_BYTES_PER_SECOND = 4e8
# Values of one block over all experts, as the engine cuts them, and bytes that a method takes for each.
_BLOCK_TOTAL, _BLOCK_SMALLEST = 1 << 19, 1 << 16
_BYTES_OF_BLOCK = {"pcb": 64}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a merge will take.

    `rank` is that of the LoRA written, with a share of energy the highest it may become, None for other outputs.
    `memory_bytes` is an upper estimate beside the interpreter, `written_bytes` an upper estimate of the weights,
    `flops` counts multiplications and additions, `seconds` are CPU seconds of one ordinary core, a rough estimate.
    """

    rank: int | None
    memory_bytes: int
    written_bytes: int
    flops: int
    seconds: float


def estimate(
    spec: Spec,
    output: Output,
    experts: Sequence[Mapping[str, Shape]],
    *,
    saved: Sequence[Mapping[str, tuple[int, ...]]] = (),
    base_bytes: int = 0,
) -> Cost:
    """What a merge by `spec` into `output` takes.

    `experts` are, per expert, module -> (d_out, d_in, rank); a rank of 0 stands for a delta that is not low rank (DoRA,
    IA3 with a base) or for a vector, (1, values, 0). `saved` are, per expert, tensors that replace tensors of the base,
    by name; `base_bytes` is the size of the base's weights, for full output.
    """
    shapes = {name: (rows, columns) for expert in experts for name, (rows, columns, _) in expert.items()}
    ranks = total_ranks(experts)
    is_dense = spec.rank_rule == "dense" or not is_low_rank(experts)
    rank = lora_rank(spec, output, experts) if output.kind == "lora" else None
    flops = sum(
        _flops(rows, columns, ranks[name], rank=rank, is_dense=is_dense) for name, (rows, columns) in shapes.items()
    )
    looked_at = sum(prod(shape) for shape in shapes.values()) * (len(experts) if is_dense else 1)
    if not is_dense and rank is not None:
        looked_at = sum(rows + columns for rows, columns in shapes.values()) * max(ranks.values(), default=1)
    kept = {name: shape for expert in saved for name, shape in expert.items()}
    written = _written(output, shapes, kept, rank=rank, base_bytes=base_bytes)
    moved = written + (base_bytes if output.kind == "full" else 0)
    seconds = flops / _FLOPS_PER_SECOND + looked_at / _VALUES_PER_SECOND + moved / _BYTES_PER_SECOND
    return Cost(
        rank=rank,
        memory_bytes=_memory(spec, output, experts, kept=kept, is_dense=is_dense, rank=rank),
        written_bytes=written,
        flops=flops,
        seconds=seconds,
    )


def is_low_rank(experts: Sequence[Mapping[str, Shape]]) -> bool:
    """Whether every delta comes as factors."""
    return all(rank > 0 for expert in experts for _, _, rank in expert.values())


def total_ranks(experts: Sequence[Mapping[str, Shape]]) -> dict[str, int]:
    """Module -> the sum of the experts' ranks; a delta that is not low rank has that of its shorter side."""
    totals: dict[str, int] = {}
    for expert in experts:
        for name, (rows, columns, rank) in expert.items():
            totals[name] = totals.get(name, 0) + (rank or min(rows, columns))
    return totals


def lora_rank(spec: Spec, output: Output, experts: Sequence[Mapping[str, Shape]]) -> int:
    """The rank of the LoRA that is written; where a share of energy decides, the highest it may become."""
    shapes = {name: (rows, columns) for expert in experts for name, (rows, columns, _) in expert.items()}
    ranks = [{name: rank or min(rows, columns) for name, (rows, columns, rank) in expert.items()} for expert in experts]
    is_dense = spec.rank_rule == "dense" or not is_low_rank(experts)
    if output.rank is not None:
        return output.rank
    if output.energy is None:
        return output_rank("dense" if is_dense else spec.rank_rule, ranks, shapes)
    if not is_dense:
        return output_rank("sum", ranks, shapes)
    return min(HIGHEST_ENERGY_RANK, max((min(shape) for shape in shapes.values()), default=1))


def _flops(rows: int, columns: int, total: int, *, rank: int | None, is_dense: bool) -> int:
    """Of one module: products for thresholds and for the merge, Gram matrices, or the SVD of a dense delta."""
    product = 2 * rows * columns * total
    if is_dense:
        return 3 * product + (40 * rows * columns * rank if rank is not None else 0)
    if rank is None:
        return product
    return 4 * (rows + columns) * total * total + 2 * (rows + columns) * total * rank + 20 * total**3


def _written(
    output: Output,
    shapes: Mapping[str, tuple[int, int]],
    kept: Mapping[str, tuple[int, ...]],
    *,
    rank: int | None,
    base_bytes: int,
) -> int:
    item = _ITEM_BYTES[output.dtype or "float32"]
    values = sum(prod(shape) for shape in shapes.values()) + sum(prod(shape) for shape in kept.values())
    heads = 4096 + 256 * (len(shapes) + len(kept))
    if rank is not None:
        factors = rank * sum(rows + columns for rows, columns in shapes.values())
        return heads + item * (factors + sum(prod(shape) for shape in kept.values()))
    if output.kind == "full":
        # Nothing tells here what dtype the base has; twice its size is float32 from bfloat16.
        return heads + base_bytes * (1 if output.dtype is None or item == 2 else 2)
    if output.kind == "ternary":
        # One bit for each value at most where positions are a mask, a byte each where they are gaps, a bit per sign.
        return heads + int(values * min(0.125 + (output.density or TERNARY_DENSITY) / 8, 1.0)) + values // 255
    return heads + item * values


def _memory(
    spec: Spec,
    output: Output,
    experts: Sequence[Mapping[str, Shape]],
    *,
    kept: Mapping[str, tuple[int, ...]],
    is_dense: bool,
    rank: int | None,
) -> int:
    shapes = {name: (rows, columns) for expert in experts for name, (rows, columns, _) in expert.items()}
    largest = max((rows * columns for rows, columns in shapes.values()), default=0)
    widest = max((rows + columns for rows, columns in shapes.values()), default=0)
    every = sum(rows + columns for rows, columns in shapes.values())
    ranks = total_ranks(experts)
    total = max(ranks.values(), default=0)
    needed = FIXED_BYTES + _saved_bytes(kept, count=len(experts))
    if "gram_in" in spec.needs:
        # The weighted sum of square matrices, its factor, and one of them as it is read.
        needed += 4 * 8 * max((columns * columns for _, columns in shapes.values()), default=0)
    if spec.name == "knots":
        # The coordinates of all experts side by side.
        needed += 24 * len(experts) * total * widest
    if is_dense:
        # The merged delta, a few copies of one block of every expert, and what comes as a matrix as it is read.
        matrices = sum(1 for expert in experts if not is_low_rank([expert]))
        block = max(_BLOCK_TOTAL, len(experts) * _BLOCK_SMALLEST)
        needed += 8 * largest + _BYTES_OF_BLOCK.get(spec.name, 24) * block + 12 * matrices * largest
        needed += 32 * widest * rank if rank is not None else 0
    else:
        held = every if spec.form == "ordered" else widest
        needed += 64 * total * held
    if rank is not None:
        # Where a module has less than the rank of the file, what it has and what is written of it.
        less = sum(4 * ranks[name] * sum(shape) for name, shape in shapes.items() if ranks[name] < rank)
        return needed + 4 * rank * every + less
    # The delta as it is written; beside the base's tensor; with the positions of what is kept of it.
    return needed + {"full": 24, "ternary": 24}.get(output.kind, 14) * largest


def _saved_bytes(kept: Mapping[str, tuple[int, ...]], *, count: int) -> int:
    """One at a time of every expert, with the base's, and all that are written."""
    sizes = [4 * prod(shape) for shape in kept.values()]
    return (count + 3) * max(sizes, default=0) + sum(sizes)
