"""FourierFT: a sparse spectrum of the delta (arXiv 2405.03003)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "fourierft",
    why="its delta is the inverse transform of a spectrum, which is not of low rank",
    markers=("fourierft_",),
)
