"""WaveFT: a sparse wavelet transform of the delta (arXiv 2505.12532)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "waveft",
    why="its delta is the inverse transform of wavelets, which is not of low rank",
    markers=("waveft_",),
)
