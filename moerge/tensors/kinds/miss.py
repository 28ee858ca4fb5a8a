"""MiSS: one small matrix shared by shards of the base (arXiv 2409.15371)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "miss",
    why="its delta repeats shards, which is not B @ A",
    markers=("miss_",),
)
