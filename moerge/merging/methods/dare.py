"""DARE: drop values at random, make up for it by rescaling, then add up or elect signs as TIES does."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import dropping, noise, parts
from moerge.merging.base import MISSING, Parameters, Spec, choice, density, flag, scale
from moerge.merging.sources import Block, Stream

Array = npt.NDArray[Any]

SPEC = Spec(
    name="dare",
    title="DARE",
    form="element-wise",
    summary="Drop values at random and rescale the rest, then sum (DARE-linear) or elect signs (DARE-TIES).",
    when="Full fine-tunes or experts with much redundancy; two or three of them; try a density of .5 first.",
    paper="arXiv 2311.03099",
    is_random=True,
    parameters=(
        density(default=0.5),
        choice("elect", ["none", "ties"], default="none", help="Add the experts up, or elect signs first as in TIES."),
        choice(
            "rescale",
            ["density", "l1", "none"],
            default="density",
            help="Divide survivors by the density, bring each tensor back to its sum of magnitudes, or neither.",
        ),
        flag(
            "normalize",
            default=False,
            help="Divide by the weights: by their sum, and with elect=ties by those that agree.",
        ),
        scale(),
        MISSING,
    ),
)


@dataclass(frozen=True)
class State:
    """Factor on the survivors of each expert and tensor."""

    factors: dropping.Factors


def prepare(stream: Stream, parameters: Parameters) -> State:
    """The factors that make up for what is dropped; only l1 has to read the deltas."""
    if parameters.rescale == "l1":
        return State(dropping.l1_factors(stream, lambda block, row: noise.keep(block.noise(row), parameters.density)))
    fixed = 1 / parameters.density if parameters.rescale == "density" else 1.0
    return State({(i, name): fixed for name in stream.names for i in range(len(stream.sources))})


def merge(block: Block, state: State, parameters: Parameters) -> Array:
    """(experts, values) -> (values,)."""
    dropped = np.zeros_like(block.values)
    for row, member in enumerate(block.members):
        kept = noise.keep(block.noise(row), parameters.density)
        factor = block.values.dtype.type(state.factors[member, block.name])
        np.multiply(block.values[row] * factor, kept, out=dropped[row])
    return parts.combine(
        dropped,
        block.weights,
        elect=parameters.elect == "ties",
        normalize=parameters.normalize,
        scale=parameters.scale,
    )
