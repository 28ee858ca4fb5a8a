"""DEFT: a subspace of the base weight, replaced by trained content."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "deft",
    why="it projects the base weight, so its delta needs the base",
    markers=("deft_",),
)
