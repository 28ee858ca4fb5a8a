"""Trainable tokens: rows of the embedding, replaced."""

from moerge.tensors.kind import stored_only

SPEC = stored_only(
    "trainable_tokens",
    why="it replaces rows of the embedding",
    markers=("trainable_tokens_",),
)
