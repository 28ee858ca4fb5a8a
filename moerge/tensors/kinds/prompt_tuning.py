"""Prompt tuning: learned input embeddings (arXiv 2104.08691)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "prompt_tuning",
    why="prompts add inputs and no delta to a weight",
    markers=("prompt_embeddings",),
)
