"""X-LoRA: a gate over other adapters (arXiv 2402.07148)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "xlora",
    why="it mixes other adapters at run time",
    markers=("xlora_",),
)
