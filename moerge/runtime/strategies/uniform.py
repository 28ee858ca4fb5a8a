"""uniform: the average of all experts that a module has."""

import torch

from moerge.runtime import gating
from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """1/m for each of the m experts."""
    del settings
    count = len(question.experts)
    return gating.everyone(torch.full((question.count, count), 1 / count, device=question.experts.device))


SPEC = Strategy(
    name="uniform",
    summary="per input: the plain average, to compare with",
    paper="https://arxiv.org/abs/2302.07027",
    choose=choose,
    per_input=True,
)
