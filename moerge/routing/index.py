"""VectorIndex: nearest unit vectors by inner product. The only file that imports faiss.

Exact today (flat). Which kind of index is used is decided here by size and seen by nobody else.
"""

import hashlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid


class VectorIndex:
    """Vectors under 64-bit ids; `copy()` before a change when others are still searching."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._faiss: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    @classmethod
    def build(cls, vectors: NDArray[np.float32], ids: NDArray[np.int64]) -> "VectorIndex":
        """An index over (n, d) vectors under (n,) ids."""
        index = cls(vectors.shape[1])
        index.add(vectors, ids)
        return index

    def __len__(self) -> int:
        return int(self._faiss.ntotal)

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        """Add (n, d) vectors under (n,) new ids. Raises IndexInvalid for another width."""
        self._check_width(vectors)
        if len(vectors):
            self._faiss.add_with_ids(
                np.ascontiguousarray(vectors, dtype=np.float32), np.ascontiguousarray(ids, dtype=np.int64)
            )

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Take out the vectors of these ids and return how many there were; unknown ids are passed over."""
        if not len(ids):
            return 0
        return int(self._faiss.remove_ids(np.ascontiguousarray(ids, dtype=np.int64)))

    def search(self, vector: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best: (d,) -> inner products and ids, both (min(k, len),), best first."""
        self._check_width(vector[None, :])
        count = min(k, len(self))
        if count <= 0:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        scores, ids = self._faiss.search(np.ascontiguousarray(vector[None, :], dtype=np.float32), count)
        return scores[0], ids[0]

    def copy(self) -> "VectorIndex":
        """An index of its own with the same vectors."""
        other = VectorIndex(self.dimension)
        other._faiss = faiss.clone_index(self._faiss)
        return other

    def save(self, path: Path) -> str:
        """Write the index to a file and return the file's SHA-256."""
        data = faiss.serialize_index(self._faiss).tobytes()
        path.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: Path, sha256: str) -> "VectorIndex":
        """Read what `save` wrote. Raises IndexInvalid when the file does not have this SHA-256."""
        data = path.read_bytes()
        met = hashlib.sha256(data).hexdigest()
        if met != sha256:
            raise IndexInvalid(
                f"{path.name} is not the index that was saved",
                pointer=path.name,
                met=met,
                wanted=sha256,
                remedy="build the index again",
            )
        stored = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        index = cls(stored.d)
        index._faiss = stored
        return index

    def _check_width(self, vectors: NDArray[np.float32]) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise IndexInvalid(
                "vectors of another width than the index",
                met=list(vectors.shape),
                wanted=f"(n, {self.dimension})",
                remedy="encode with the encoder the index was built with",
            )
