"""IA3: learned vectors multiply what a module takes in or puts out (arXiv 2205.05638), so its delta needs the base."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "ia3", why="it multiplies what the base computes, so its delta is (l - 1) times the base weight",
    endings={"ia3_l": "l"},
)  # fmt: skip
