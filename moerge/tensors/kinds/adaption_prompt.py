"""Adaption prompt: gated prompts inside attention layers (LLaMA-Adapter) (arXiv 2303.16199)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "adaption_prompt",
    why="prompts add attention inputs and no delta to a weight",
    markers=("adaption_",),
)
