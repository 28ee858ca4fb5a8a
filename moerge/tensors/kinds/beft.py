"""BEFT: biases of value projections, trained (arXiv 2509.15974)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "beft",
    why="it trains biases, which have no low-rank delta",
    markers=("beft_",),
)
