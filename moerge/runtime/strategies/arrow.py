"""Arrow: the experts whose deltas stretch the token most, judged by their leading input directions."""

from moerge.runtime import gating
from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """The largest |u·p_e|, weighed by a softmax at `temperature` over those kept; the sign of p_e means nothing."""
    assert question.tokens is not None
    assert question.vectors is not None
    return gating.best((question.tokens @ question.vectors.T).abs() / settings.temperature, settings.top_k)


SPEC = Strategy(
    name="arrow",
    summary="per token, from the weights alone: |u·p|, p the leading right singular vector of an expert's delta",
    paper="https://arxiv.org/abs/2405.11157",
    choose=choose,
    kind="arrow",
)
