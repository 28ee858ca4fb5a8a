"""The routing of one module: a hook on a stock LoRA layer of PEFT, and the count of who was used."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moerge.errors import ParameterInvalid
from moerge.runtime import inputs, mixing
from moerge.runtime.base import Choice, Question, Settings, Strategy
from moerge.runtime.errors import NotRoutable
from moerge.runtime.inputs import Passage
from moerge.runtime.mixing import Stack


@dataclass(eq=False)
class Plan:
    """What all modules of a model share: how to choose, the pass that is under way, and scores of whole inputs.

    `scores` (inputs, experts) fit a pass of that many inputs, or of a multiple, as beam search makes it.
    """

    strategy: Strategy
    settings: Settings
    passage: Passage
    scores: Tensor | None = None
    watched: dict[str, list[Tensor]] | None = None


@dataclass(eq=False)
class Router:
    """The experts of one module: their numbers in the model, their names in PEFT and their vectors (m, d_in).

    `total` is how many experts the model has; `used` (m,) is the sum of the weights that each expert of the module was
    given, over all tokens that are no padding.
    """

    module: str
    plan: Plan
    experts: tuple[int, ...]
    names: tuple[str, ...]
    vectors: Tensor | None
    total: int
    used: Tensor = field(init=False)
    _stack: Stack | None = None
    _numbers: Tensor = field(init=False)
    _kept: Choice | None = None

    def __post_init__(self) -> None:
        self._numbers = torch.tensor(self.experts, dtype=torch.long)
        self.used = torch.zeros(len(self.experts), dtype=torch.float64)
        if self.vectors is not None:
            self.vectors = self.plan.strategy.prepare(self.vectors)

    def __call__(self, layer: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After a LoRA layer without active adapters has given the base's output: add what the chosen experts add."""
        if layer.disable_adapters or not self.experts:
            return None
        if layer.active_adapters:
            raise ParameterInvalid(
                f"An adapter was set active in {self.module}, which is routed.", pointer=self.module,
                met=", ".join(layer.active_adapters), wanted="no active adapter",
                remedy="Use the strategy top1 for one expert alone, or a PeftModel of your own.",
            )  # fmt: skip
        given = arguments[0]
        stack = self._ready(layer)
        tokens = given.reshape(-1, given.shape[-1]).to(stack.A.dtype)
        choice = self._choose(tokens, given)
        base = layer.get_base_layer()
        flat = output.reshape(len(tokens), -1).to(stack.A.dtype)
        return stack.add(choice, tokens, flat, bias=getattr(base, "bias", None)).reshape(output.shape).to(output.dtype)

    def _ready(self, layer: Any) -> Stack:
        """The stack, made anew when the model has moved to another device or type."""
        first = layer.lora_A[self.names[0]].weight
        if self._stack is None or self._stack.A.data_ptr() != first.data_ptr():
            self._stack = mixing.stacked(layer, self.names)
            self._numbers = self._numbers.to(first.device)
            self.used = self.used.to(first.device)
            if self.vectors is not None:
                self.vectors = self.vectors.to(first.device, _precise(first.dtype))
        return self._stack

    def _choose(self, tokens: Tensor, given: Tensor) -> Choice:
        """(n, k) experts and weights for the tokens, which are counted."""
        strategy, settings = self.plan.strategy, self.plan.settings
        sequence = self.plan.passage.of(given)
        counted = inputs.counted(sequence, tuple(given.shape))
        # A choice between near equals is made in single precision at least.
        precise = tokens.to(_precise(tokens.dtype))
        count = len(given) if given.dim() > 2 else sequence.count or len(given)
        if not strategy.per_input:
            scores = self._scores(count)
            if scores is not None:
                scores = scores.repeat_interleave(self._length(tokens, count), dim=0)
            choice = strategy.choose(self._question(len(tokens), precise, scores), settings)
        else:
            length = self._length(tokens, count)
            # What the tokens of a prompt have decided holds for all that is generated after it.
            is_decided = sequence.continues and self._kept is not None and len(self._kept.experts) == count
            if self._kept is None or strategy.kind is None or not is_decided:
                means = _means(precise, counted, count, length) if strategy.kind else None
                self._kept = strategy.choose(self._question(count, means, self._scores(count)), settings)
            choice = Choice(*(one.repeat_interleave(length, dim=0) for one in (self._kept.experts, self._kept.weights)))
        self._count(choice, counted, tuple(given.shape[:-1]))
        return choice

    def _question(self, count: int, tokens: Tensor | None, scores: Tensor | None) -> Question:
        return Question(count=count, experts=self._numbers, tokens=tokens, vectors=self.vectors, scores=scores)

    def _length(self, tokens: Tensor, count: int) -> int:
        """Tokens per input."""
        if len(tokens) % count:
            raise NotRoutable(
                f"{self.module} takes in tokens apart from the inputs they belong to.", pointer=self.module,
                met=f"{len(tokens)} tokens of {count} inputs", wanted="the same number of each input",
                remedy="Use a strategy that asks about tokens alone, such as arrow or phatgoose.",
            )  # fmt: skip
        return len(tokens) // count

    def _scores(self, count: int) -> Tensor | None:
        """(inputs, experts) scores of the pass under way."""
        if not self.plan.strategy.needs_scores:
            return None
        given = self.plan.scores
        if given is None or count % len(given):
            raise ParameterInvalid(
                f"{self.plan.strategy.name} needs to know how well each expert fits each input.", pointer="scores",
                met="none" if given is None else f"scores of {len(given)} inputs for {count}",
                wanted="scores of one input, or of as many as there are",
                remedy="Call set_scores, or ask with the text that the hub is to route.",
            )  # fmt: skip
        return given.to(self._numbers.device).repeat_interleave(count // len(given), dim=0)

    def _count(self, choice: Choice, counted: Tensor | None, shape: tuple[int, ...]) -> None:
        weights = choice.weights.double()
        if self.plan.watched is not None:
            whole = mixing.spread(self._numbers[choice.experts], weights, self.total)
            self.plan.watched.setdefault(self.module, []).append(whole.reshape(*shape, self.total))
        if counted is not None:
            weights = weights * counted[:, None].to(weights.device)
        self.used.index_add_(0, choice.experts.flatten(), weights.flatten())


def _means(tokens: Tensor, counted: Tensor | None, count: int, length: int) -> Tensor:
    """(count, d_in): the mean of each input's tokens that are no padding."""
    apart = tokens.reshape(count, length, -1)
    if counted is None:
        return apart.mean(dim=1)
    shares = counted.reshape(count, length, 1).to(tokens)
    return (apart * shares).sum(dim=1) / shares.sum(dim=1).clamp(min=1)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
