"""AdaMSS: trained subspaces, clustered from the singular directions of the base."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "adamss",
    why="its subspaces come from the base weight",
    markers=("adamss_",),
)
