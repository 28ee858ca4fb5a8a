"""What of a forward pass a module deep inside must know: how many inputs, which tokens are padding, what was before.

Hooks on the model, or on encoder and decoder where it has both, read it from the arguments as they come by.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features")


@dataclass(frozen=True, eq=False)
class Sequence:
    """Inputs on their way through a stack of layers: (inputs, length) of `mask`, True where there is no padding."""

    count: int = 0
    mask: Tensor | None = None
    continues: bool = False


class Passage:
    """The pass that is under way. `own` is what the layers pass on, `other` what a decoder reads of its encoder."""

    def __init__(self) -> None:
        self.own = Sequence()
        self._other: tuple[Tensor, Sequence] | None = None

    def watch(self, base: Any) -> list[Any]:
        """Hooks on the model, whose handles are returned."""
        parts = [base]
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            parts = [base.get_encoder(), base.get_decoder()]
        return [part.register_forward_pre_hook(self._enter, with_kwargs=True) for part in parts]

    def of(self, tokens: Tensor) -> Sequence:
        """The sequence that a module's input belongs to."""
        if self._other is not None and self._other[0].data_ptr() == tokens.data_ptr():
            return self._other[1]
        return self.own

    def _enter(self, part: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = inspect.signature(part.forward).bind_partial(*arguments, **named).arguments
        # What a forward takes as **kwargs is a dictionary in one argument.
        given = {
            **{name: value for one in given.values() if isinstance(one, dict) for name, value in one.items()},
            **given,
        }
        count = next((len(given[name]) for name in _TOKENS if isinstance(given.get(name), Tensor)), 0)
        self.own = Sequence(
            count, _mask(given.get("attention_mask")), continues=_length(given.get("past_key_values")) > 0
        )
        memory = given.get("encoder_hidden_states")
        self._other = None
        if isinstance(memory, Tensor):
            self._other = memory, Sequence(count, _mask(given.get("encoder_attention_mask")))


def counted(sequence: Sequence, shape: tuple[int, ...]) -> Tensor | None:
    """Which of the tokens of a module's input (…, d_in), in order, are no padding; None where all count.

    With a cache the mask also tells of earlier tokens, which are left out.
    """
    mask, count = sequence.mask, int(torch.Size(shape[:-1]).numel())
    if mask is None:
        return None
    if sequence.continues and len(shape) == 3 and shape[0] == len(mask):
        mask = mask[:, -shape[1] :]
    return mask.flatten() if mask.numel() == count else None


def _mask(given: Any) -> Tensor | None:
    """A mask of one row per input; masks of pairs of tokens do not tell padding apart from what is to come."""
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


def _length(cache: Any) -> int:
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)
