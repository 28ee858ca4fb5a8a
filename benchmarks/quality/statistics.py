"""Means with their standard errors: over seeds, and of paired differences row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Spread:
    """A mean and its standard error; None where there is one value alone."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Paired:
    """A mean difference over rows and seeds, with two standard errors.

    `rows` is that of other test rows under the same trainings: differences are first averaged over seeds for each row,
    since a hard row is hard under every seed. `seeds` is that of other trainings on the same rows.
    """

    mean: float
    rows: float | None
    seeds: float | None


def spread(values: Sequence[float] | Values) -> Spread:
    """Mean of independent values, and their standard deviation (n - 1) over the root of their number."""
    found = np.asarray(values, np.float64)
    if found.size == 0:
        raise ValueError("no values to average")
    error = float(found.std(ddof=1)) / sqrt(found.size) if found.size > 1 else None
    return Spread(float(found.mean()), error)


def paired(values: Sequence[Values], originals: Sequence[Values]) -> Paired:
    """Values minus originals, each a list over seeds of (rows,) measured on the same rows in the same order."""
    if len(values) != len(originals):
        raise ValueError(f"{len(values)} seeds against {len(originals)}")
    differences = np.stack([np.subtract(*pair, dtype=np.float64) for pair in zip(values, originals, strict=True)])
    over_rows, over_seeds = spread(differences.mean(axis=0)), spread(differences.mean(axis=1))
    return Paired(over_rows.mean, over_rows.error, over_seeds.error)
