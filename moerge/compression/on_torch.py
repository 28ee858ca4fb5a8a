"""Top-k and inner products by torch, for tensors that are large enough to pay for the way to a GPU and back."""

import numpy as np
import torch

from moerge.compression import arithmetic, selection
from moerge.compression.planes import Positions
from moerge.compression.scales import Product
from moerge.tensors.files import Float32

# A guess that no GPU has judged yet: numpy selects from a million values in about 15 ms.
LEAST_VALUES = 1 << 20
_BLOCK_VALUES = 1 << 24


class Torch:
    """An `Arithmetic` on a torch device. Tensors of fewer than `least_values` stay on the processor."""

    def __init__(self, device: str, *, least_values: int = LEAST_VALUES) -> None:
        self.device = torch.device(device)
        self._least_values = least_values

    def keep_largest(self, values: Float32, density: float) -> Positions:
        """As `selection.keep_largest`, to the last index."""
        if values.size < max(1, self._least_values):
            return selection.keep_largest(values, density)
        flat = torch.from_numpy(values.reshape(-1)).to(self.device).abs()
        count = selection.count_for(flat.numel(), density)
        threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
        kept = flat > threshold
        if threshold > 0:
            ties = torch.nonzero(flat == threshold).reshape(-1)
            kept[ties[: count - int(kept.sum())]] = True
        found: Positions = torch.nonzero(kept).reshape(-1).cpu().numpy()
        return found

    def product(self, A: Float32, B: Float32, A_image: Float32, B_image: Float32) -> Product:
        """As `scales.product`, but for the order of its float64 sums."""
        if A.size + B.size < self._least_values:
            return arithmetic.NUMPY.product(A, B, A_image, B_image)
        aa, ah, hh = self._grams(A, A_image)
        bb, bh, kk = self._grams(B.T, B_image.T)
        return Product(float((bb * aa).sum()), float((bh * ah).sum()), float((kk * hh).sum()))

    def _grams(self, left: Float32, other: Float32) -> "list[torch.Tensor]":
        """(rank, n), (rank, n) -> left·leftᵀ, left·otherᵀ, other·otherᵀ in float64, block by block along n."""
        rank = left.shape[0]
        sums = [torch.zeros((rank, rank), dtype=torch.float64, device=self.device) for _ in range(3)]
        width = max(1, _BLOCK_VALUES // max(1, rank))
        for start in range(0, left.shape[1], width):
            first, second = (self._moved(side[:, start : start + width]) for side in (left, other))
            for total, (one, two) in zip(sums, ((first, first), (first, second), (second, second)), strict=True):
                total.add_(one @ two.T)
        return sums

    def _moved(self, part: Float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(part)).to(self.device).double()
