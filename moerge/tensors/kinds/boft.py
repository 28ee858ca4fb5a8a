"""BOFT: a product of sparse rotations of the base weight (arXiv 2311.06243)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "boft",
    why="it rotates the base weight, so its delta needs the base",
    markers=("boft_",),
)
