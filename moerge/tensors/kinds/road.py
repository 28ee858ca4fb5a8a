"""RoAd: rotations of pairs of outputs (arXiv 2409.00119)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "road",
    why="it rotates what the base computes, so its delta needs the base",
    markers=("road_",),
)
