"""SMEAR: all experts of a module merged softly into one, anew for each input."""

from moerge.runtime import gating
from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """A softmax over all experts of LN(ū)·LN(v_e) / sqrt(d_in), ū the mean of the input's tokens.

    The deltas are averaged, not their factors, so that experts of unequal ranks can be merged. The paper trains its
    router together with the experts; here PHATGOOSE's gates, trained for each expert alone, stand in for it.
    """
    del settings
    assert question.tokens is not None
    assert question.vectors is not None
    return gating.everyone((gating.standardised(question.tokens) @ question.vectors.T).softmax(dim=1))


SPEC = Strategy(
    name="smear",
    summary="per input, by trained gates: one merged delta, weighed by the gates on the mean token",
    paper="https://arxiv.org/abs/2306.03745",
    choose=choose,
    kind="phatgoose",
    prepare=gating.prepared,
    per_input=True,
)
