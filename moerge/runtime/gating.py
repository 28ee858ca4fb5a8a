"""Steps that strategies share: gates compared with tokens, and the best few kept."""

from math import sqrt

import torch
from torch import Tensor

from moerge.runtime.base import Choice


def standardised(vectors: Tensor) -> Tensor:
    """Layer norm without weights: mean 0 and variance 1 in each row (epsilon 1e-5)."""
    return torch.nn.functional.layer_norm(vectors, vectors.shape[-1:])


def prepared(gates: Tensor) -> Tensor:
    """(m, d_in) -> (m, d_in): what a standardised token is multiplied with to have LN(u)·LN(v) / sqrt(d_in)."""
    return standardised(gates) / sqrt(gates.shape[-1])


def best(logits: Tensor, top_k: int) -> Choice:
    """The largest `top_k` of (n, m) logits and their softmax: what a softmax over all leaves after renormalising."""
    kept = logits.topk(min(top_k, logits.shape[1]), dim=1)
    return Choice(kept.indices, kept.values.softmax(dim=1))


def everyone(weights: Tensor) -> Choice:
    """All m experts with these weights (n, m)."""
    return Choice(torch.arange(weights.shape[1], device=weights.device).expand(weights.shape), weights)
