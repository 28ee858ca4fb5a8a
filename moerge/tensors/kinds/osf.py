"""OSF: the small singular directions of the base, trained (arXiv 2504.07097)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "osf",
    why="it rewrites singular directions of the base, so its delta needs the base",
    markers=("osf_",),
)
