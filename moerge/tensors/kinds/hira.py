"""HiRA: the base weight times a low-rank product, element by element."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "hira",
    why="it multiplies the base weight, so its delta needs the base",
    markers=("hira_",),
)
