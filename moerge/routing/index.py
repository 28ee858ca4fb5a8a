"""VectorIndex: nearest unit vectors by inner product. The only file that imports faiss.

Which kind of index is used is decided here by size, and a caller need only know whether it is exact:

- flat: every row is compared; exact on the float16 rows.
- graph: HNSW (Malkov and Yashunin, arXiv:1603.09320), 32 links a node.
- lists: an inverted file of about 2 sqrt(n) lists with 8 bits a value (Sivic and Zisserman, ICCV 2003).

The last two name rows that are likely near. Flat and graph compare the float16 rows themselves; the scores of lists
are taken from the rows afterwards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid

# Measured at 384 values a row on one thread: up to the first limit comparing all takes under half a millisecond;
# above the second the graph takes longer to build than anybody waits for.
FLAT_LIMIT = 10_000
GRAPH_LIMIT = 500_000

_LINKS = 32
_EF_CONSTRUCTION = 160
_EF_SEARCH = 224
_PROBES = 32
# faiss asks for at least 39 rows a list to place the lists.
_TRAINING_ROWS_PER_LIST = 64
_SEED = 20_231
_BLOCK = 65_536
_SCORE_BLOCK = 1_024


class VectorIndex:
    """Float16 rows (n, d), numbered from 0, and what finds the near ones among them; never changed once made."""

    def __init__(self, rows: NDArray[np.float16], found_by: Any) -> None:
        self.rows = rows
        self.exact = isinstance(found_by, faiss.IndexScalarQuantizer)
        self._coarse = isinstance(found_by, faiss.IndexIVF)
        if isinstance(found_by, faiss.IndexHNSW):
            found_by.hnsw.efSearch = _EF_SEARCH
        elif isinstance(found_by, faiss.IndexIVF):
            found_by.nprobe = _PROBES
        self._faiss = found_by

    @classmethod
    def build(
        cls, rows: NDArray[np.float16], *, flat_limit: int = FLAT_LIMIT, graph_limit: int = GRAPH_LIMIT
    ) -> "VectorIndex":
        """An index over (n, d) rows: flat up to `flat_limit` rows, a graph up to `graph_limit`, lists above.

        Equal rows give an equal index.
        """
        count, dimension = rows.shape
        threads = faiss.omp_get_max_threads()
        # Several threads add rows to a graph in an order of their own, and every order gives another graph.
        faiss.omp_set_num_threads(1)
        try:
            if count <= flat_limit:
                made = _flat(dimension)
            elif count <= graph_limit:
                made = _index(dimension, f"HNSW{_LINKS},SQfp16")
                made.hnsw.efConstruction = _EF_CONSTRUCTION
            else:
                lists = round(2 * count**0.5)
                made = _index(dimension, f"IVF{lists},SQ8")
                made.cp.seed = _SEED
                made.train(_sample(rows, _TRAINING_ROWS_PER_LIST * lists))
            for block in _blocks(rows):
                made.add(block)
        finally:
            faiss.omp_set_num_threads(threads)
        return cls(rows, made)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dimension(self) -> int:
        return int(self.rows.shape[1])

    def search(self, vector: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best: (d,) -> inner products and rows, both of at most k, best first.

        Fewer than min(k, n) are found when no more lie where a search that is not exact looks.
        """
        self._check_width(vector)
        count = min(k, len(self))
        if count <= 0:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        asked = np.ascontiguousarray(vector[None, :], dtype=np.float32)
        scores, rows = (found[0] for found in self._faiss.search(asked, count))
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        if not self._coarse:
            return scores, rows
        scores = self.scores(vector, rows)
        order = np.argsort(-scores, kind="stable")
        return scores[order], rows[order]

    def scores(self, vector: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Exact inner products with these rows: (d,), (m,) -> (m,)."""
        scores = np.empty(len(rows), dtype=np.float32)
        asked = np.ascontiguousarray(vector[None, :], dtype=np.float32)
        # numpy takes 3 ns to widen one float16; faiss multiplies them as they are, four times as fast.
        for start in range(0, len(rows), _SCORE_BLOCK):
            some = rows[start : start + _SCORE_BLOCK]
            scan = _flat(self.dimension)
            scan.add_sa_codes(np.ascontiguousarray(self.rows[some]).view(np.uint8))
            found, places = scan.search(asked, len(some))
            scores[start + places[0]] = found[0]
        return scores

    def save(self, path: Path) -> None:
        """Write what finds the rows, but not the rows, to a file."""
        faiss.write_index(self._faiss, str(path))

    @classmethod
    def open(cls, path: Path, rows: NDArray[np.float16]) -> "VectorIndex":
        """Map what `save` wrote into memory, which processes share. The file must be known to be whole.

        Raises IndexInvalid when it is not an index over these rows.
        """
        try:
            stored = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexInvalid(
                f"{path.name} is not a vector index", pointer=path.name, remedy="build the snapshot again"
            ) from error
        if (stored.ntotal, stored.d) != rows.shape:
            raise IndexInvalid(
                f"{path.name} is an index over other vectors",
                pointer=path.name,
                met=[stored.ntotal, stored.d],
                wanted=list(rows.shape),
                remedy="build the snapshot again",
            )
        return cls(rows, stored)

    def _check_width(self, vector: NDArray[np.float32]) -> None:
        if vector.shape != (self.dimension,):
            raise IndexInvalid(
                "a vector of another width than the index",
                met=list(vector.shape),
                wanted=f"({self.dimension},)",
                remedy="encode with the encoder the index was built with",
            )


def _flat(dimension: int) -> Any:
    return faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def _index(dimension: int, factory: str) -> Any:
    return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)


def _sample(rows: NDArray[np.float16], count: int) -> NDArray[np.float32]:
    chosen = np.random.default_rng(_SEED).permutation(len(rows))[:count]
    return rows[np.sort(chosen)].astype(np.float32)


def _blocks(rows: NDArray[np.float16]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK].astype(np.float32)
