"""TIES: trim each expert, elect a sign per value, and merge only what agrees with it.

Three public behaviours differ in more than detail; `variant` picks one and the parameters that default to null may
then be set apart from it.

release   the authors' code: ranks over the whole expert, keeps one value more and all equal ones, elects by the
          unweighted sum, gives zero sums the majority's sign, divides by the number that agree.
peft      ranks per tensor, elects by the unweighted sum (or by counting signs), weights afterwards, divides by the
          number that agree, so that weights do not normalise.
mergekit  ranks per tensor, elects by the weighted sum, divides by the weights of those that agree.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts, selection
from moerge.merging.base import MISSING, Parameters, Spec, choice, density, flag, integer, scale
from moerge.merging.compiled import Kernels
from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="ties",
    title="TIES",
    form="element-wise",
    summary="Trim each expert to its largest values, elect a sign per value, merge those that agree with it.",
    when="Three to eight experts whose signs conflict; keep 20 % and a scale of 1 to begin with.",
    paper="arXiv 2306.01708",
    parameters=(
        density(),
        choice(
            "variant",
            ["mergekit", "peft", "release"],
            default="mergekit",
            help="Whose behaviour: mergekit weighs before the election and normalises; peft and the authors' release"
            " elect unweighted and divide by the number of experts that agree.",
        ),
        choice("aggregate", ["mean", "sum", "max"], default="mean", help="What is taken of the values that agree."),
        choice(
            "elect",
            ["total", "frequency"],
            default="total",
            help="The sign of the sum of values, or of the sum of their signs.",
        ),
        choice(
            "scope",
            ["tensor", "global"],
            default=None,
            help="Rank values per tensor or over a whole expert. Null: global for release, else tensor.",
        ),
        choice(
            "zero_sign",
            ["positive", "majority"],
            default=None,
            help="The sign where the votes cancel: plus, or that of most values. Null: majority in release, else plus.",
        ),
        integer(
            "min_keep",
            default=None,
            minimum=0,
            maximum=1,
            help="Keep at least this many values of a tensor. Null: 0 for peft, else 1.",
        ),
        flag("normalize", default=True, help="mergekit's mean divides by the weights that agree; false: by nothing."),
        scale(),
        MISSING,
    ),
)


@dataclass(frozen=True)
class State:
    """Where each expert is cut, and the sign given to values whose votes cancel."""

    cuts: selection.Cuts
    zero: int
    kernels: Kernels | None = None


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Thresholds of every expert, and the majority sign where it is asked for."""
    is_release = parameters.variant == "release"
    minimum = parameters.min_keep if parameters.min_keep is not None else int(parameters.variant != "peft")
    found = selection.cuts(
        stream,
        density=parameters.density,
        scope=parameters.scope or ("global" if is_release else "tensor"),
        minimum=minimum,
        release=is_release,
    )
    zero_sign = parameters.zero_sign or ("majority" if is_release else "positive")
    zero = _majority(stream, found, parameters) if zero_sign == "majority" else 1
    return State(found, zero, stream.kernels)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """(experts, values) -> (values,)."""
    if state.kernels is not None:
        return _merge_compiled(block, state, state.kernels, parameters)
    trimmed = selection.trim(block, state.cuts)
    weighted = parts.weigh(trimmed, block.weights)
    votes = _votes(trimmed, weighted, parameters)
    signs = parts.elect_signs(votes, by=parameters.elect, zero=state.zero)
    agreeing = parts.agree(votes, signs)
    weighted *= agreeing
    if parameters.aggregate == "max":
        largest = np.abs(weighted).max(axis=0)
        return np.asarray(largest * signs * weighted.dtype.type(parameters.scale))
    merged = parts.total(weighted)
    divisors = _divisors(block, parameters)
    if divisors.any():
        merged = parts.divide(merged, parts.weight_of(agreeing, divisors))
    return np.asarray(merged * merged.dtype.type(parameters.scale))


def _merge_compiled(block: Block, state: State, kernels: Kernels, parameters: Parameters) -> Array:
    """The same by a compiled loop, bit for bit."""
    dtype = block.values.dtype
    cuts = [state.cuts.get((member, block.name), selection.NOTHING) for member in block.members]
    thresholds = [cut.threshold for cut in cuts]
    return kernels.elect_and_merge(
        block.values,
        np.array([thresholds, block.weights, _divisors(block, parameters)], dtype=dtype),
        np.array([cut.reach(block.offset, block.values.shape[1]) for cut in cuts], dtype=np.int64),
        (
            parameters.variant == "mergekit",
            parameters.elect == "frequency",
            state.zero < 0,
            parameters.aggregate == "max",
        ),
        dtype.type(parameters.scale),
    )


def _votes(trimmed: Array, weighted: Array, parameters: Parameters) -> Array:
    return weighted if parameters.variant == "mergekit" else trimmed


def _divisors(block: Block, parameters: Parameters) -> Array:
    """What each expert adds to the divisor where it agrees, (experts,); zeros where nothing is divided."""
    dtype = block.values.dtype
    if parameters.aggregate != "mean" or (parameters.variant == "mergekit" and not parameters.normalize):
        return np.zeros(len(block.weights), dtype=dtype)
    return block.weights.astype(dtype) if parameters.variant == "mergekit" else np.ones(len(block.weights), dtype=dtype)


def _majority(stream: Stream, found: selection.Cuts, parameters: Parameters) -> int:
    """The sign of the sum of all elected signs of the whole delta; plus when that is zero."""

    def count(block: Block) -> int:
        trimmed = selection.trim(block, found)
        votes = _votes(trimmed, parts.weigh(trimmed, block.weights), parameters)
        return int(parts.elect_signs(votes, by=parameters.elect, zero=0).sum(dtype=np.float64))

    votes = sum(value for name in stream.names for _, value in stream.over_blocks(name, count))
    return -1 if votes < 0 else 1
