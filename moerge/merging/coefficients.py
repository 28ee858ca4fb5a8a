"""Single numbers that evaluation has found: statistics of an expert as a whole or per tensor.

loss          the mean loss of an expert on a few examples of a task, under the name `*`
coefficients  what learning has found for each tensor of an expert, or under `*` for all that are not named
"""

import math
from typing import Any

from moerge.errors import ExpertsIncompatible
from moerge.merging.sources import Source

WHOLE = "*"


def of(source: Source, kind: str, name: str = WHOLE) -> float:
    """The number of one kind for a tensor, or for the whole expert where the tensor is not named.

    Raises ExpertsIncompatible, naming expert and tensor, where there is none or it is not finite.
    """
    known = source.statistics.get(kind, {})
    given = known.get(name, known.get(WHOLE))
    met: Any = None if given is None else float(given)
    if met is None or not math.isfinite(met):
        whose = str(source) if name == WHOLE else f"{name} in {source}"
        raise ExpertsIncompatible(
            f"{kind} of {whose} is {met}, wanted a finite number.",
            pointer="/experts",
            met=str(met),
            wanted="a finite number",
            remedy=f"Hand in {kind} under the name of each tensor, or under {WHOLE} for the whole expert.",
        )
    return float(met)
