"""HRA: a chain of reflections of the base weight (arXiv 2405.17484)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "hra",
    why="it reflects the base weight, so its delta needs the base",
    markers=("hra_",),
)
