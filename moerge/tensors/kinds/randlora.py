"""RandLoRA: scaled sums of random bases (arXiv 2502.00987)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "randlora",
    why="its bases come from a seed and may not be in the file",
    markers=("randlora_",),
)
