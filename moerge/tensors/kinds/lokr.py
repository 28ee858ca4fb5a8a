"""LoKr: a Kronecker product of two small matrices (arXiv 2309.14859)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "lokr",
    why="its delta is a Kronecker product, which is not of low rank",
    markers=("lokr_",),
)
