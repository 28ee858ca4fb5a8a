"""AdaLoRA: B @ diag(E) @ A with ranks found in training (arXiv 2303.10512)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "adalora",
    why="the rank that scales its delta is not in the file",
    markers=("lora_",),
)
