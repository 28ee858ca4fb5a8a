"""GLoRA: scaled and shifted weights and biases (arXiv 2306.07967)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "glora",
    why="its delta has a part that multiplies the base weight",
    markers=("glora_",),
)
