"""VeRA: scaling vectors between shared random projections (arXiv 2310.11454)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "vera",
    why="its projections come from a seed and may not be in the file",
    markers=("vera_",),
)
