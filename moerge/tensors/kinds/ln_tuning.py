"""LN tuning: the layer norms, trained (arXiv 2312.11420)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "ln_tuning",
    why="it replaces norms of the base, which have no low-rank delta",
    markers=("ln_tuning_",),
)
