"""Uni-LoRA: all factors projected from one vector."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "unilora",
    why="its factors are projected from one vector by a seed",
    markers=("unilora_",),
)
