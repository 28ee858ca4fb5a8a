"""FRoD: projections shared by modules of one role, with trained coefficients."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "frod",
    why="its projections are shared between modules",
    markers=("frod_",),
)
