"""OFT: a rotation of the base weight (arXiv 2306.07280)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "oft",
    why="it rotates the base weight, so its delta needs the base",
    markers=("oft_",),
)
