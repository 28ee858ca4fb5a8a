"""What a token-level strategy is: what a module takes in goes in, experts and their weights come out."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`top_k` experts are kept; `temperature` divides Arrow's scores; `alpha` multiplies GLIDER's global scores."""

    top_k: int = 2
    temperature: float = 1.0
    alpha: float = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Which of a module's m experts for each of n tokens (or inputs)?

    `tokens` (n, d_in) is what the module takes in and `vectors` (m, d_in) what was prepared of its experts, where the
    strategy has vectors; `scores` (n, experts) is how well each expert of the model fits the whole input, where it
    needs that; `experts` (m,) are the numbers of the module's experts among those of the model.
    """

    count: int
    experts: Tensor
    tokens: Tensor | None = None
    vectors: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """(n, k) positions among the module's experts, and their weights (n, k)."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A file of `strategies/`.

    `kind` names the vectors it compares tokens with ("arrow" or "phatgoose"; None where it looks at no token), and
    `prepare` is done to them once. `per_input` strategies are asked once for an input, with the mean of its tokens.
    """

    name: str
    summary: str
    paper: str
    choose: Callable[[Question, Settings], Choice]
    kind: str | None = None
    prepare: Callable[[Tensor], Tensor] = lambda vectors: vectors
    per_input: bool = False
    needs_scores: bool = False
