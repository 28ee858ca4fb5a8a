"""P-tuning: prompts made by a small encoder (arXiv 2103.10385)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "p_tuning",
    why="prompts add inputs and no delta to a weight",
    markers=("prompt_embeddings",),
)
