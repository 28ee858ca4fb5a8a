"""CPT: prompts that start from the tokens of a context (arXiv 2410.17222)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "cpt",
    why="prompts add inputs and no delta to a weight",
    markers=(
        "prompt_embeddings",
        "cpt_",
    ),
)
