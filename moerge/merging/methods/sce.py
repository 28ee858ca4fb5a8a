"""SCE: select values by their variance over experts, weigh experts by energy, erase minority signs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts, selection
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
    """Per tensor: where the variances of its values are cut, None for nowhere; and the weight of each expert."""

    selected: dict[str, selection.Cut | None]
    shares: dict[str, Array]


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Select by variance, then weigh by mean square; no absolute guards, so the method is free of scale."""
    selected: dict[str, selection.Cut | None] = {}
    shares = {}
    for name in stream.names:
        cut = selected[name] = _selected(stream, name, parameters)

        def energy(block: Block, cut: selection.Cut | None = cut) -> Array:
            squares = np.square(_kept(parts.weigh(block.values, block.weights), cut, block.offset), dtype=np.float64)
            return np.asarray(squares.reshape(len(squares), -1, block.width).sum(axis=2))

        sums = np.concatenate([found for _, found in stream.over_blocks(name, energy)], axis=1).sum(axis=1)
        shares[name] = sums / sums.sum() if sums.sum() > 0 else np.full(len(sums), 1 / len(sums))
    return State(selected, shares)


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """sum s_t x_t agree / sum s_t agree, (experts, values) -> (values,)."""
    values = parts.weigh(block.values, block.weights)
    shares = state.shares[block.name]
    if parameters.variant == "mergekit":
        values = _kept(values, state.selected[block.name], block.offset)
    agreeing = parts.agree(values, parts.elect_signs(values))
    numerator = parts.weighted_total(values * agreeing, shares)
    return parts.divide(numerator, parts.weight_of(agreeing, shares))


def _selected(stream: Stream, name: str, parameters: Parameters) -> selection.Cut | None:
    """Where the share of a tensor's values begins on which experts differ most.

    None at a share of 1, which takes all of them, whether they differ or not, so that a single expert is itself.
    """
    if parameters.select == 1:
        return None
    weights = stream.weights[list(stream.members(name))]

    def pieces() -> Iterator[tuple[int, Array]]:
        for offset, values in stream.stretches(name):
            yield offset, _variance(parts.weigh(values, weights))

    size, varying = stream.size(name), sum(int(np.count_nonzero(found)) for _, found in pieces())
    kept = parts.count_kept(parameters.select, varying, minimum=0)
    if kept == 0:
        return selection.NOTHING
    return selection.Cut(
        *selection.find(
            pieces,
            size=size,
            kept=kept,
            sample=lambda: _variance(parts.weigh(stream.samples(name, selection.SAMPLE_VALUES), weights)),
            kernels=stream.kernels,
        )
    )


def _kept(weighted: Array, cut: selection.Cut | None, offset: int) -> Array:
    """Weighted values with those set to zero that are not selected, (experts, values) alike."""
    return weighted if cut is None else weighted * cut.mask(_variance(weighted), offset)


def _variance(weighted: Array) -> Array:
    """Population variance over experts, in float64 so that cancellation does not reorder values."""
    values = weighted.astype(np.float64)
    mean = parts.total(values) / len(values)
    return parts.total(np.square(values - mean)) / len(values)
