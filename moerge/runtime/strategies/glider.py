"""GLIDER: PHATGOOSE's gates, leaning towards the experts that fit the whole input."""

from moerge.runtime import gating
from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """LN(u)·LN(v_e) / sqrt(d_in) + alpha * score_e, where the score is the same for all tokens and modules."""
    assert question.tokens is not None
    assert question.vectors is not None
    assert question.scores is not None
    local = gating.standardised(question.tokens) @ question.vectors.T
    return gating.best(local + settings.alpha * question.scores[:, question.experts], settings.top_k)


SPEC = Strategy(
    name="glider",
    summary="per token, by trained gates and a score of each expert for the whole input, times alpha",
    paper="https://arxiv.org/abs/2410.07172",
    choose=choose,
    kind="phatgoose",
    prepare=gating.prepared,
    needs_scores=True,
)
