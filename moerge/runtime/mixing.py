"""The factors of all experts of one module side by side, and the weighed sum of what chosen ones add to its output."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from moerge.runtime.base import Choice

# Costs in multiplications of a CPU, measured on one core at widths of 256 to 2048: of turning to one more expert, and
# of moving a value of a chosen token to its expert and back. Fewer tokens than so many cost no less: reading the
# factors then takes the time.
_TURN_COST = 1_700_000
_MOVE_COST = 32
_LEAST_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Stack:
    """A (R, d_in) and B (R, d_out), R the sum of the ranks; expert e has the rows from `starts[e]` to `starts[e + 1]`.

    `scales` (experts,) are the scalings and `owners` (R,) the expert of each row. `biases` (experts, d_out) is what
    lora_bias adds. With DoRA (arXiv 2402.09353) an expert's output is g * (W u + s B A u), g its magnitude over the
    norm of its rows: B then holds g * B, and `stretches` (experts, d_out) is g - 1.
    """

    A: Tensor
    B: Tensor
    starts: tuple[int, ...]
    scales: Tensor
    owners: Tensor
    biases: Tensor | None
    stretches: Tensor | None

    def add(self, choice: Choice, tokens: Tensor, output: Tensor, *, bias: Tensor | None) -> Tensor:
        """`output` (n, d_out), to which the chosen experts' parts for `tokens` (n, d_in) are added in place.

        Both have the type of the factors. `bias` is the base layer's own, which DoRA does not stretch.
        """
        weights = choice.weights.to(self.A.dtype)
        if self.stretches is not None or self.biases is not None:
            self._add_vectors(spread(choice.experts, weights, len(self.scales)), output, bias)
        if self._is_sparse(choice, tokens):
            self._add_by_expert(choice.experts, weights * self.scales[choice.experts], tokens, output)
        else:
            inner = tokens @ self.A.T
            # Selecting columns by an index in brackets takes five times as long.
            inner *= (spread(choice.experts, weights, len(self.scales)) * self.scales).index_select(1, self.owners)
            output.addmm_(inner, self.B)
        return output

    def _is_sparse(self, choice: Choice, tokens: Tensor) -> bool:
        """Whether to turn to each expert in use costs less than to compute all experts for all tokens."""
        if tokens.device.type != "cpu":
            # To know which experts are in use, the processor would wait for the device.
            return False
        count, kept = choice.experts.shape
        experts, ranks, width = len(self.scales), self.starts[-1], self.A.shape[1] + self.B.shape[1]
        all_of_all = max(count, _LEAST_TOKENS) * width * ranks
        by_expert = count * kept * width * (ranks / experts + _MOVE_COST) + min(experts, count * kept) * _TURN_COST
        return bool(by_expert < all_of_all)

    def _add_by_expert(self, experts: Tensor, weights: Tensor, tokens: Tensor, output: Tensor) -> None:
        order = experts.flatten().argsort()
        rows = order // experts.shape[1]
        weights = weights.flatten()[order, None]
        start = 0
        for expert, count in enumerate(experts.flatten().bincount(minlength=len(self.scales)).tolist()):
            if not count:
                continue
            mine, own = rows[start : start + count], slice(self.starts[expert], self.starts[expert + 1])
            inner = (tokens.index_select(0, mine) @ self.A[own].T) * weights[start : start + count]
            output.index_add_(0, mine, inner @ self.B[own])
            start += count

    def _add_vectors(self, weights: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """What does not go through the factors: DoRA's stretch of the base's own output, and biases."""
        if self.stretches is not None:
            plain = output if bias is None else output - bias
            output += weights @ self.stretches * plain
        if self.biases is not None:
            output += (weights * self.scales) @ self.biases


def spread(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """(n, k) positions and weights -> (n, count) weights, 0 for those not chosen."""
    return weights.new_zeros(len(weights), count).scatter_add_(1, experts, weights)


def stacked(layer: Any, names: Sequence[str]) -> Stack:
    """The adapters of these names in a LoRA layer of PEFT.

    Their factors become views into the stack, so that they are held once and stay usable by PEFT.
    """
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
    left, right = torch.cat([A.detach() for A, _ in pairs]), torch.cat([B.detach().T for _, B in pairs])
    starts = (0, *accumulate(len(A) for A, _ in pairs))
    for (A, B), (start, end) in zip(pairs, pairwise(starts), strict=True):
        A.data, B.data = left[start:end], right[start:end].T
    owners = torch.tensor([expert for expert, (A, _) in enumerate(pairs) for _ in A], device=left.device)
    stretches = _stretches(layer, names)
    return Stack(
        A=left,
        B=right if stretches is None else right * (stretches + 1)[owners],
        starts=starts,
        scales=torch.tensor([layer.scaling[name] for name in names], dtype=left.dtype, device=left.device),
        owners=owners,
        biases=_biases(layer, names),
        stretches=stretches,
    )


def _biases(layer: Any, names: Sequence[str]) -> Tensor | None:
    found = [layer.lora_B[name].bias for name in names]
    if all(bias is None for bias in found):
        return None
    width = layer.lora_B[names[0]].weight.new_zeros(layer.out_features)
    return torch.stack([width if bias is None else bias.detach() for bias in found])


def _stretches(layer: Any, names: Sequence[str]) -> Tensor | None:
    """DoRA's factor less one, by PEFT's own norm; 0 for experts without DoRA."""
    if not any(layer.use_dora[name] for name in names):
        return None
    rows = []
    for name in names:
        first, second = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        if not layer.use_dora[name]:
            rows.append(second.new_zeros(layer.out_features))
            continue
        dora = layer.lora_magnitude_vector[name]
        base = layer.get_base_layer().weight.detach().to(first.dtype)
        norm = dora.get_weight_norm(base, second @ first, layer.scaling[name])
        rows.append(dora.weight.detach() / norm - 1)
    return torch.stack(rows)
