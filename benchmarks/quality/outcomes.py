"""What an expert made of each test row."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Outcome:
    """Of each row: whether the likeliest label was right, and the negative log-likelihood of the right one."""

    correct: npt.NDArray[np.bool_]
    nll: npt.NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        """Share of rows answered right."""
        return float(self.correct.mean())

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood."""
        return float(self.nll.mean(dtype=np.float64))
