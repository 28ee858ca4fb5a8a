"""SCE: select values by their variance over experts, weigh experts by energy, erase minority signs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts
from moerge.merging.base import MISSING, Parameters, Spec, choice, number
from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="sce",
    title="SCE",
    form="element-wise",
    summary="Keep the values on which experts differ most, weigh experts by their energy, erase minority signs.",
    when="Experts of one model family tuned on different data, where a few values differ much.",
    paper="arXiv 2408.07990",
    version=2,
    parameters=(
        number(
            "select",
            default=1.0,
            minimum=0.0,
            above=True,
            maximum=1.0,
            help="Share of each tensor's values, by variance over the experts, that is kept.",
        ),
        choice(
            "variant",
            ["mergekit", "fuseai"],
            default="mergekit",
            help="mergekit drops what is not selected; the authors' release only leaves it out of the weights.",
        ),
        MISSING,
    ),
)


@dataclass(frozen=True)
class State:
    """Per tensor: which values are selected (flat), and the weight of each expert."""

    selected: dict[str, npt.NDArray[np.bool_]]
    shares: dict[str, Array]


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Select by variance, then weigh by mean square; no absolute guards, so the method is free of scale."""
    selected, shares = {}, {}
    for name in stream.names:
        mask = selected[name] = _selected(stream, name, parameters)

        def energy(block: Block, mask: npt.NDArray[np.bool_] = mask) -> Array:
            part = mask[block.offset : block.offset + block.values.shape[1]]
            return np.asarray(np.square(parts.weigh(block.values, block.weights) * part, dtype=np.float64))

        rows = [
            found.reshape(len(found), -1, stream.width(name)).sum(axis=2)
            for _, found in stream.over_blocks(name, energy)
        ]
        sums = np.concatenate(rows, axis=1).sum(axis=1)
        shares[name] = sums / sums.sum() if sums.sum() > 0 else np.full(len(sums), 1 / len(sums))
    return State(selected, shares)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """sum s_t x_t agree / sum s_t agree, (experts, values) -> (values,)."""
    values = parts.weigh(block.values, block.weights)
    shares = state.shares[block.name]
    if parameters.variant == "mergekit":
        values = values * state.selected[block.name][block.offset : block.offset + values.shape[1]]
    agreeing = parts.agree(values, parts.elect_signs(values))
    numerator = parts.weighted_total(values * agreeing, shares)
    return parts.divide(numerator, parts.weight_of(agreeing, shares))


def _selected(stream: Stream, name: str, parameters: Parameters) -> npt.NDArray[np.bool_]:
    """The share of a tensor's values on which experts differ most; all of them at a share of 1, whether they differ or
    not, so that a single expert is itself.
    """
    if parameters.select == 1:
        return np.ones(stream.size(name), dtype=np.bool_)
    variance = np.concatenate([found for _, found in stream.over_blocks(name, _variance)])
    kept = parts.count_kept(parameters.select, int(np.count_nonzero(variance)), minimum=0)
    return parts.keep_largest(variance, kept)


def _variance(block: Block) -> Array:
    """Population variance over experts, in float64 so that cancellation does not reorder values."""
    values = parts.weigh(block.values, block.weights).astype(np.float64)
    mean = parts.total(values) / len(values)
    return parts.total(np.square(values - mean)) / len(values)
