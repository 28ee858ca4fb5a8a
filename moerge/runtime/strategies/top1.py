"""top1: one expert for the whole input, as a router of queries finds it."""

from moerge.runtime.base import Choice, Question, Settings, Strategy


def choose(question: Question, settings: Settings) -> Choice:
    """The expert with the best score, the first of equals; nothing where it has no delta for the module."""
    del settings
    assert question.scores is not None
    chosen = question.scores.argmax(dim=1, keepdim=True) == question.experts
    return Choice(chosen.long().argmax(dim=1, keepdim=True), chosen.any(dim=1, keepdim=True).to(question.scores.dtype))


SPEC = Strategy(
    name="top1",
    summary="per input: the expert with the best score, alone",
    paper="https://arxiv.org/abs/2302.03202",
    choose=choose,
    per_input=True,
    needs_scores=True,
)
