"""AdaMerging: every tensor of every expert with its own coefficient, learned on unlabelled inputs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moerge.merging import coefficients, mixing
from moerge.merging.base import MISSING, Parameters, Spec, flag, scale
from moerge.merging.sources import Delta, Stream

SPEC = Spec(
    name="adamerging",
    title="AdaMerging",
    form="whole",
    group=3,
    needs=("coefficients",),
    rank_rule="sum",
    summary="Sum of deltas with a learned coefficient per expert and tensor, or per expert; exact on the factors.",
    when="Coefficients were learned on unlabelled inputs of the tasks; give them as statistics of each expert.",
    paper="arXiv 2310.02575",
    parameters=(
        flag("clamp", default=True, help="Bring coefficients into 0 .. 1 first, as the authors' code does."),
        scale(),
        MISSING,
    ),
)


def merge(stream: Stream, parameters: Parameters) -> Iterator[tuple[str, Delta]]:
    """scale * sum w clamp(coefficient) D; with weights w of 1 what was published."""
    for name in stream.names:
        members = list(stream.members(name))
        found = np.array([coefficients.of(stream.sources[i], "coefficients", name) for i in members])
        if parameters.clamp:
            found = np.clip(found, 0.0, 1.0)
        yield name, mixing.total(stream.deltas(name), parameters.scale * stream.weights[members] * found)


def entropy(logits: npt.NDArray[Any]) -> float:
    """What learning the coefficients makes small: the mean entropy of predictions, logits (inputs, classes)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(np.exp(logs) * logs).sum(axis=1).mean())
