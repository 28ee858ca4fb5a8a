"""Any encoder that sentence-transformers can read from a folder. The only file that imports that package (10 s)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

_BATCH = 16


class Foreign:
    """A model that this project has no code of its own for; one thread at a time."""

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        self._model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        self._model.max_seq_length = max_tokens
        self.dimension = int(self._model.get_embedding_dimension() or 0)

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode: (n) texts -> (n, dimension) rows, of whatever length the model gives them."""
        # What stands before a query is the caller's to say, so the folder's own prompts are left out.
        rows = self._model.encode(
            list(texts), prompt="", batch_size=_BATCH, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(rows, dtype=np.float32)
