"""Lily: factors shared between layers and mixed by a router (arXiv 2407.09946)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "lily",
    why="its factors are shared between layers and mixed by a router",
    markers=("lily_",),
)
