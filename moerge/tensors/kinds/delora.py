"""DeLoRA: normalised low-rank updates with a bound (arXiv 2503.18225)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "delora",
    why="its delta is scaled by norms of the base, so it needs the base",
    markers=("delora_",),
)
