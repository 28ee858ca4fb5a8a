"""Cards and vectors made by hand or from a seed: no encoder needed."""

import zlib

import numpy as np

from moerge.routing import cards
from moerge.routing.cards import Card, Entry
from moerge.routing.state import State

DIMENSION = 8
WORDS = ["book", "cancel", "flight", "hotel", "oven", "recipe", "salt", "bank", "card", "transfer", "joke", "story"]


def unit(*values: float) -> np.ndarray:
    """The first values of a unit vector of width DIMENSION, the rest 0, scaled to length 1."""
    vector = np.zeros(DIMENSION, dtype=np.float64)
    vector[: len(values)] = values
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def entry(
    expert: str,
    *,
    base: str = "base/a",
    name: str = "name",
    description: str = "",
    examples: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    instruction: str = "",
    vectors: list[np.ndarray] | None = None,
    seed: int = 0,
) -> Entry:
    """An entry with given vectors (one for each of its texts, in order), or with seeded ones."""
    card = Card(
        expert=expert,
        base_model=base,
        name=name,
        description=description,
        examples=examples,
        tags=tags,
        instruction=instruction,
        number=number_of(expert),
        revision=7,
    )
    if vectors is None:
        rng = np.random.default_rng(number_of(expert) + seed)
        rows = rng.normal(size=(len(cards.texts(card)), DIMENSION))
        vectors = list((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    return cards.entry(card, np.array(vectors, dtype=np.float32))


def terms(text: str) -> list[str]:
    """Words, marks and pairs of neighbours, read letter by letter."""
    single: list[str] = []
    before = " "
    for letter in text.lower():
        is_word = letter in "abcdefghijklmnopqrstuvwxyz0123456789"
        if is_word and before in "abcdefghijklmnopqrstuvwxyz0123456789":
            single[-1] += letter
        elif not letter.isspace():
            single.append(letter)
        before = letter
    return single + [single[place] + " " + single[place + 1] for place in range(len(single) - 1)]


def number_of(text: str) -> int:
    """The number of an expert in the hub: the same in every process, unlike hash(), and never 0."""
    return 1 + zlib.crc32(text.encode())


def crowd(count: int, *, base: str = "base/a", seed: int = 0, examples: int = 3) -> list[Entry]:
    """Seeded entries with words and vectors of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        texts = tuple(
            " ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(rng.integers(0, examples + 1))
        )
        made.append(
            entry(
                f"{base}/{number:03d}",
                base=base,
                name=str(rng.choice(WORDS)),
                description=" ".join(rng.choice(WORDS, size=4)),
                examples=texts,
                seed=seed,
            )
        )
    return made


def state(*entries: Entry) -> State:
    """A state that holds these entries."""
    return State(encoder_id="test", dimension=DIMENSION).changed(seq=1, put=entries)
