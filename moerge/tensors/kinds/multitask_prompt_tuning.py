"""Multitask prompt tuning: a shared prompt and low-rank task parts (arXiv 2303.02861)."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "multitask_prompt_tuning",
    why="prompts add inputs and no delta to a weight",
    markers=(
        "prompt_embeddings",
        "prefix_task_",
    ),
)
