"""Shadow: a small network beside the base."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "shadow",
    why="it runs a network beside the base",
    markers=("shadow_",),
)
