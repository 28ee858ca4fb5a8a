"""Card: what is known of an expert in words, and the texts that stand for it in the index."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerge.errors import IndexInvalid

MAX_EXAMPLES = 32
# A word, or any other visible character but half of a surrogate pair, which no index can store.
_TOKEN = re.compile(r"[a-z0-9]+|[^\sa-z0-9\x00-\x1f\x7f\ud800-\udfff]")
_NAME_SEPARATORS = re.compile(r"[-_.]+")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One expert in words: its id, the base model it works on, and what its uploader wrote.

    `number` and `revision` are the expert's and its revision's numbers in the hub; routing carries them along.
    """

    expert: str
    base_model: str
    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    instruction: str = ""
    number: int = 0
    revision: int = 0


def tokens(text: str) -> list[str]:
    """The terms that BM25 compares, lower-cased: words, marks, and each pair of neighbours among them.

    Words are runs of ASCII letters and digits; every other visible character is a mark. Inputs of one task have marks
    and turns of phrase in common more than words, and scripts that are written without spaces are compared by their
    characters and pairs of characters.
    """
    single = _TOKEN.findall(text.lower())
    return single + [f"{first} {second}" for first, second in pairwise(single)]


def used_examples(card: Card) -> tuple[str, ...]:
    """The examples that count: those with a visible character, at most the first 32."""
    return tuple(text for text in card.examples if text.strip())[:MAX_EXAMPLES]


def texts(card: Card) -> tuple[str, ...]:
    """The texts to encode: `name. description`, then one per used example, last the instruction if there is one."""
    described = f"{_plain_name(card)}. {card.description}".strip()
    return (described, *used_examples(card), *((card.instruction,) if has_instruction(card) else ()))


def has_instruction(card: Card) -> bool:
    """Whether somebody wrote, with a visible character, what the expert does."""
    return bool(card.instruction.strip())


def document(card: Card) -> str:
    """The text that BM25 reads: name, description and examples, whole and uncut; not the instruction."""
    return "\n".join((_plain_name(card), card.description, *used_examples(card)))


def _plain_name(card: Card) -> str:
    """Names of repositories write words with hyphens, which encoder and BM25 read as signs of their own."""
    return _NAME_SEPARATORS.sub(" ", card.name)


def digest(card: Card) -> str:
    """SHA-256 of the encoded texts and what they are: cards of equal digest have equal vectors."""
    encoded: list[Any] = list(texts(card))
    if has_instruction(card):
        # Else a card whose only other text is this one as an example would have the same digest.
        encoded[-1] = {"instruction": card.instruction}
    return hashlib.sha256(json.dumps(encoded, ensure_ascii=True).encode()).hexdigest()


def centroid(examples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalised mean of the example vectors: (n, d) -> (d,); opposite examples give the zero vector."""
    mean = examples.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    return np.asarray(mean / length if length > 1e-12 else mean * 0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A card with its vectors, ready for the index; never changed once made.

    `vectors` is (2 + examples [+ 1], d): row 0 the description, row 1 the centroid of the examples, then the examples,
    last the instruction of a card that has one. Without examples row 1 repeats the description, as the score wants it.
    The values are those of float16, in which the hub stores them, so that an index built from rows and one built from
    texts give the same scores.
    """

    card: Card
    vectors: NDArray[np.float32]
    counts: Counter[str] = field(repr=False)


def entry(card: Card, vectors: NDArray[np.float32]) -> Entry:
    """Join a card with the fresh vectors of `texts(card)`: one unit row (d,) for each.

    Raises IndexInvalid when their number is not that of the texts.
    """
    _check_count(card, vectors, wanted=len(texts(card)))
    rounded = vectors.astype(np.float16).astype(np.float32)
    examples = rounded[1 : len(rounded) - has_instruction(card)]
    middle = centroid(examples) if len(examples) else rounded[0]
    return restored(card, np.concatenate([rounded[:1], middle[None, :], rounded[1:]]).astype(np.float16))


def restored(card: Card, rows: NDArray[np.float16]) -> Entry:
    """Join a card with its stored rows: description, centroid, examples, instruction: (1 + texts, d).

    Raises IndexInvalid when their number is not that of the card.
    """
    _check_count(card, rows, wanted=len(texts(card)) + 1)
    vectors = rows.astype(np.float32)
    vectors.setflags(write=False)
    return Entry(card=card, vectors=vectors, counts=Counter(tokens(document(card))))


def _check_count(card: Card, rows: NDArray[np.float16] | NDArray[np.float32], *, wanted: int) -> None:
    if rows.ndim != 2 or len(rows) != wanted:
        raise IndexInvalid(
            f"{card.expert} has vectors of shape {rows.shape}, wanted {wanted} rows",
            pointer=card.expert,
            met=list(rows.shape),
            wanted=f"{wanted} rows",
            remedy="encode the card again",
        )
