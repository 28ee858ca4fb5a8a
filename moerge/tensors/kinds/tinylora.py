"""TinyLoRA: a few values projected onto singular directions of the base (arXiv 2602.04118)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "tinylora",
    why="it acts on singular directions of the base, so its delta needs the base",
    markers=("tinylora_",),
)
