"""Breadcrumbs: drop each expert's largest values as outliers and its smallest as noise, then add up."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import parts, selection
from moerge.merging.base import MISSING, Parameters, Spec, choice, density, flag, number, scale
from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="breadcrumbs",
    title="Model Breadcrumbs",
    form="element-wise",
    summary="Drop each expert's largest values (gamma) and keep the next ones (density), then add up.",
    when="Many experts, some of them with a few huge values that would drown the rest.",
    paper="arXiv 2312.06795",
    divides_by_weights=True,
    parameters=(
        density(),
        number(
            "gamma", default=0.01, minimum=0.0, maximum=1.0, below=True, help="Share of the largest values to drop."
        ),
        choice("scope", ["tensor", "row"], default="tensor", help="Rank values over a tensor or in each of its rows."),
        scale(),
        flag("normalize", default=False, help="Divide by the sum of the weights."),
        MISSING,
    ),
)


@dataclass(frozen=True)
class State:
    """Cuts of the values to drop and of those plus the values to keep, per expert and tensor; empty per row."""

    dropped: selection.Cuts
    reached: selection.Cuts


def prepare(stream: Stream, parameters: Parameters) -> State:
    """Cuts of the band of ranks that is kept in each tensor."""
    if parameters.scope == "row":
        return State({}, {})
    drop, reach = {}, {}
    for name in stream.names:
        top, kept = _band(parameters, stream.size(name))
        drop[name], reach[name] = top, top + kept
    return State(selection.cuts_at(stream, drop), selection.cuts_at(stream, reach))


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """scale * sum w_t band_t, (experts, values) -> (values,)."""
    if parameters.scope == "row":
        top, kept = _band(parameters, block.width)
        values = np.stack([_rows(row.reshape(-1, block.width), top, top + kept) for row in block.values])
    else:
        values = selection.trim(block, state.reached) - selection.trim(block, state.dropped)
    divisor = block.weights.sum() if parameters.normalize else np.float64(1)
    return parts.weighted_total(values, parameters.scale * block.weights / divisor)


def _band(parameters: Parameters, size: int) -> tuple[int, int]:
    """How many of the largest values to drop and how many of the next to keep."""
    kept = parts.count_kept(parameters.density, size, minimum=0)
    return min(parts.count_kept(parameters.gamma, size, minimum=0), size - kept), kept


def _rows(rows: Array, first: int, last: int) -> Array:
    """Keep ranks first .. last of each row by magnitude, flat; equal magnitudes by lower index first."""
    order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, first:last]
    result = np.zeros_like(rows)
    np.put_along_axis(result, order, np.take_along_axis(rows, order, axis=1), axis=1)
    return result.ravel()
