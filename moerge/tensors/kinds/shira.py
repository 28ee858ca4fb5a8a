"""SHiRA: a sparse set of base values, trained (arXiv 2406.13175).

PEFT stores their places as integers, a dtype that weights files may not hold, so such files stop at the header.
"""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "shira",
    why="its delta is sparse, which is not of low rank",
    markers=("shira_",),
)
