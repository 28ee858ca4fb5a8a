"""C3A: circular convolutions (arXiv 2407.19342)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "c3a",
    why="its delta is block-circular, which is not of low rank",
    markers=("c3a_",),
)
