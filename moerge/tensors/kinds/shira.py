"""SHiRA: a sparse set of base values, trained (arXiv 2406.13175)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "shira",
    why="its delta is sparse, which is not of low rank",
    markers=("shira_",),
)
