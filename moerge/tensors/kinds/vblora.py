"""VB-LoRA: factors composed from a shared vector bank (arXiv 2405.15179)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "vblora",
    why="its factors are composed from a vector bank",
    markers=("vblora_",),
)
