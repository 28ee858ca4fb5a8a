"""Poly: several LoRA skills mixed per task (arXiv 2202.13914)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "poly",
    why="its skills are mixed per task at run time",
    markers=("poly_",),
)
