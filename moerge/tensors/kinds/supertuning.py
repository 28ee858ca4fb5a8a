"""Super-Tuning: the base values of largest magnitude, trained (arXiv 2607.09287)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "supertuning",
    why="its delta is sparse, which is not of low rank",
    markers=("supertuning_",),
)
