"""Asking a hub which experts fit: texts in, ranked experts out, in as many requests as it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moerge.client.errors import AnswerInvalid, ClientError
from moerge.client.hub import Hub
from moerge.client.records import mapping

TEXTS_AT_ONCE = 32
MOST_RESULTS = 50
MOST_CHARACTERS = 20_000
# While its encoder loads a hub answers by words alone; who measures waits for it.
_LOADING_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How texts are routed; what is None is left to the hub."""

    base_model: str | None = None
    strategy: str | None = None
    top_k: int = 10
    min_score: float | None = None
    filters: Mapping[str, Any] = field(default_factory=dict)
    explain: bool = False

    def body(self, texts: Sequence[str]) -> dict[str, Any]:
        given = {
            "base_model": self.base_model,
            "strategy": self.strategy,
            "min_score": self.min_score,
            "filters": dict(self.filters) or None,
            "explain": self.explain or None,
        }
        known = {name: value for name, value in given.items() if value is not None}
        return {"texts": list(texts), "top_k": self.top_k, **known}


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An expert for a text; `record` is all that the hub told of it."""

    expert: str
    score: float
    confidence: str
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a hub answered to one text; `best_score` and the thresholds also where it abstained."""

    hits: tuple[Hit, ...]
    abstained: bool
    best_score: float | None
    min_score: float
    default_min_score: float
    strategy: str
    degraded: bool
    index_seq: int


def ask(hub: Hub, texts: Sequence[str], wish: Wish, *, whole: bool = False) -> Iterator[Answer]:
    """One answer for each text, in order.

    `whole` waits, within the caller's time, for a hub whose encoder is still loading. Raises ClientError.
    """
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        patience = hub.patience()
        while True:
            _, body = hub.post("/api/v1/route", wish.body(some), patience=patience)
            answers = _answers(body, count=len(some))
            if not (whole and any(answer.degraded for answer in answers)):
                break
            patience.wait(_LOADING_SECONDS, ClientError("The hub is still loading its encoder.", pointer=hub.endpoint))
        yield from answers


def _answers(body: Any, *, count: int) -> list[Answer]:
    fields = mapping(body, "the answer")
    rows, seq = fields.get("answers"), fields.get("index_seq")
    if not isinstance(rows, list) or len(rows) != count or type(seq) is not int:
        raise _odd("answers", f"{count} answers and index_seq")
    return [_answer(mapping(row, "an answer"), seq) for row in rows]


def _answer(fields: Mapping[str, Any], index_seq: int) -> Answer:
    rows = fields.get("results")
    if not isinstance(rows, list) or len(rows) > MOST_RESULTS:
        raise _odd("results", f"at most {MOST_RESULTS} results")
    best = fields.get("best_score")
    return Answer(
        hits=tuple(_hit(mapping(row, "a result")) for row in rows),
        abstained=fields.get("abstained") is True,
        best_score=None if best is None else _score(best, "best_score"),
        min_score=_score(fields.get("min_score"), "min_score"),
        default_min_score=_score(fields.get("default_min_score"), "default_min_score"),
        strategy=str(fields.get("strategy") or "")[:40],
        degraded=fields.get("degraded") is True,
        index_seq=index_seq,
    )


def _hit(fields: Mapping[str, Any]) -> Hit:
    expert, confidence = fields.get("expert"), fields.get("confidence")
    if not isinstance(expert, str) or not isinstance(confidence, str):
        raise _odd("results", "expert and confidence as texts")
    return Hit(expert=expert, score=_score(fields.get("score"), "score"), confidence=confidence, record=fields)


def _score(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _odd(what, "a number")
    return float(value)


def _odd(what: str, wanted: str) -> AnswerInvalid:
    return AnswerInvalid(
        f"The hub's answer has an odd {what}.", pointer=what, met="something else", wanted=wanted,
        remedy="Check that the endpoint is the address of a hub of this version.",
    )  # fmt: skip
