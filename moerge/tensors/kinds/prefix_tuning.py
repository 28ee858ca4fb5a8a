"""Prefix tuning: learned keys and values before every layer (arXiv 2101.00190)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "prefix_tuning",
    why="prefixes add keys and values and no delta to a weight",
    markers=("prompt_embeddings",),
)
