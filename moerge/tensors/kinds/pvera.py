"""PVeRA: VeRA with a probability over its vectors."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "pvera",
    why="its projections come from a seed and may not be in the file",
    markers=("pvera_",),
)
