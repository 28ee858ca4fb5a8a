"""PHATGOOSE: the experts whose trained gates point the token's way."""

from moerge.runtime import gating
from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """LN(u)·LN(v_e) / sqrt(d_in), a softmax over all experts, the largest `top_k` of it renormalised."""
    assert question.tokens is not None
    assert question.vectors is not None
    return gating.best(gating.standardised(question.tokens) @ question.vectors.T, settings.top_k)


SPEC = Strategy(
    name="phatgoose",
    summary="per token, by trained gates: LN(u)·LN(v) / sqrt(d_in)",
    paper="https://arxiv.org/abs/2402.05859",
    choose=choose,
    kind="phatgoose",
    prepare=gating.prepared,
)
