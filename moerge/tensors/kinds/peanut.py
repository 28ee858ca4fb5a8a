"""PEANuT: updates computed from the base weight by small networks (arXiv 2410.01870)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "peanut",
    why="its delta is computed from the base weight",
    markers=("peanut_",),
)
