"""Cartridge: a trained key-value cache (arXiv 2506.06266)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "cartridge",
    why="a cache adds keys and values and no delta to a weight",
    markers=(
        "prompt_embeddings",
        "cartridge_",
    ),
)
