"""PSOFT: B @ (R - I) @ A with a rotation R in the principal subspace of the base."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "psoft",
    why="its A and B come from the base weight",
    markers=("psoft_",),
)
