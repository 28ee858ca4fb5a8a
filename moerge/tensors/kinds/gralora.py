"""GraLoRA: one low-rank product per block of the base weight (arXiv 2505.20355)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "gralora",
    why="its delta is low-rank per block only",
    markers=("gralora_",),
)
