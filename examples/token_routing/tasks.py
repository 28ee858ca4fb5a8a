"""The synthetic text tasks: what is asked in how many wordings, what the right answer is, and what counts as right.

An input is one or more parts, each a wording and a payload: `spell backwards: kitn; write capitals: abce =`. The answer
has one piece per part: `ntik;ABCE`. The general tasks are what the base is taught; each of the experts' tasks has one
expert. Letters of a payload are drawn at random, so nothing but the rule can be learned.
"""

import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

VOWELS = "aeiou"
LEXICON = MappingProxyType(
    {
        "horse": "cheval", "bird": "oiseau", "fish": "poisson", "tree": "arbre", "house": "maison", "bread": "pain",
        "flower": "fleur", "milk": "lait", "book": "livre", "child": "enfant", "king": "roi", "queen": "reine",
        "night": "nuit", "moon": "lune", "snow": "neige", "rain": "pluie", "city": "ville", "street": "rue",
        "door": "porte", "hand": "main",
    }
)  # fmt: skip
SEGMENTS = ("first half read", "second half read", "first piece written", "second piece written")
# Payloads with this remainder are for tests alone: neither base, experts nor gates see them in training.
_HELD_OUT, _OF = 0, 5


@dataclass(frozen=True)
class Task:
    """A rule, the wordings that ask for it, and where its payloads come from."""

    name: str
    description: str
    wordings: tuple[str, ...]
    answer: Callable[[str], str]
    payload: Callable[[random.Random], str]


@dataclass(frozen=True)
class Item:
    """One input with the right pieces of its answer; `tasks` names the task of each part."""

    text: str
    pieces: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def answer(self) -> str:
        return ";".join(self.pieces)


def reverse(word: str) -> str:
    return word[::-1]


def alphabetical(word: str) -> str:
    return "".join(sorted(word))


def capitals(word: str) -> str:
    return word.upper()


def following(word: str) -> str:
    """Every letter replaced by the next of the alphabet, z by a."""
    return "".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in word)


def vowels(word: str) -> str:
    """How many of a, e, i, o and u there are, as a digit."""
    return str(sum(letter in VOWELS for letter in word))


def alternate(word: str) -> str:
    """The first letter, the third and so on."""
    return word[::2]


def french(words: str) -> str:
    return " ".join(LEXICON[word] for word in words.split())


def plural(word: str) -> str:
    """The rule of English: es after s, x and z, ies for a y after a consonant, s elsewhere."""
    if word[-1] in "sxz":
        return word + "es"
    if word[-1] == "y" and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def _letters(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 6)))


def _with_vowels(chance: random.Random) -> str:
    """Half of the letters are vowels, so that every count occurs."""
    letters = (chance.choice(VOWELS if chance.random() < 0.5 else string.ascii_lowercase) for _ in range(5))
    return "".join(letters)


def _noun(chance: random.Random) -> str:
    """Three endings, as often as each other: a hissing sound, a y, any letter."""
    stem = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 4)))
    return stem + chance.choice(("sxz", "y", string.ascii_lowercase)[chance.randrange(3)])


def _words(chance: random.Random) -> str:
    return " ".join(chance.choices(tuple(LEXICON), k=chance.randint(2, 3)))


def _capital_letters(chance: random.Random) -> str:
    return _letters(chance).upper()


# What the base is shown the form of.
ASKED = (
    Task(
        "reverse",
        "Writes a word from its last letter to its first.",
        ("spell backwards", "reverse these letters", "mirror this word", "turn word around"),
        reverse,
        _letters,
    ),
    Task(
        "alphabetical",
        "Puts the letters of a word into the order of the alphabet.",
        ("sort these letters", "alphabetical order please", "arrange letters alphabetically", "order characters"),
        alphabetical,
        _letters,
    ),
    Task(
        "capitals",
        "Writes a word in upper case.",
        ("write capitals", "make upper case", "shout this word", "uppercase letters please"),
        capitals,
        _letters,
    ),
    Task(
        "following",
        "Shifts each letter to the next one of the alphabet, as in a Caesar cipher with step one.",
        ("shift each letter forward", "caesar cipher", "replace letters with following ones", "encrypt this"),
        following,
        _letters,
    ),
    Task(
        "vowels",
        "Counts how many vowels a word has.",
        ("count vowels", "number vowels here", "tell vowel count", "vowels present"),
        vowels,
        _with_vowels,
    ),
    Task(
        "alternate",
        "Keeps every second letter of a word, beginning with the first.",
        ("keep every second letter", "skip every other character", "take alternate letters", "thin this word"),
        alternate,
        _letters,
    ),
    Task(
        "french",
        "Translates English nouns into French.",
        ("translate into french", "what does this mean french", "french words", "english french dictionary"),
        french,
        _words,
    ),
    Task(
        "plural",
        "Gives the plural of a noun by the spelling rules of English.",
        ("make plural", "more than single", "pluralise noun", "several such things"),
        plural,
        _noun,
    ),
)
# The base never wrote a capital or a French word, which experts as small as these did not learn in the time there is:
# `capitals` had a loss of 1.9 after 400 steps where others have .02 to .1.
EXPERTS = tuple(task for task in ASKED if task.name not in {"capitals", "french"})
GENERAL = (
    Task("copy", "", ("repeat exactly", "copy this"), lambda word: word, _letters),
    Task("first", "", ("give first letter", "initial letter"), lambda word: word[0], _letters),
    Task("last", "", ("give last letter", "final letter"), lambda word: word[-1], _letters),
    Task("tail", "", ("drop first letter", "remove initial"), lambda word: word[1:], _letters),
    Task("rotate", "", ("move first behind", "rotate left"), lambda word: word[1:] + word[0], _letters),
    Task("ends", "", ("swap ends", "exchange first last"), lambda word: word[-1] + word[1:-1] + word[0], _letters),
    Task(
        "double", "", ("double each letter", "stutter"), lambda word: "".join(2 * letter for letter in word), _letters
    ),
    Task("earliest", "", ("earliest letter", "smallest letter"), min, _letters),
    Task("latest", "", ("latest letter", "largest letter"), max, _letters),
    Task("length", "", ("measure length", "number characters"), lambda word: str(len(word)), _letters),
    Task("small", "", ("small letters", "make lower case"), lambda word: word.lower(), _capital_letters),
    Task(
        "before",
        "",
        ("letter before each", "shift back"),
        lambda word: "".join("z" if letter == "a" else chr(ord(letter) - 1) for letter in word),
        _letters,
    ),
)
TASKS = MappingProxyType({task.name: task for task in (*ASKED, *GENERAL)})

# Two halves of one input for two experts; `mixed` draws any two.
COMPOSITIONS = MappingProxyType(
    {
        "reverse + following": ("reverse", "following"),
        "alternate + plural": ("alternate", "plural"),
        "alphabetical + following": ("alphabetical", "following"),
        "mixed": None,
    }
)


def _vocabulary_words() -> tuple[str, ...]:
    wordings = {word for task in TASKS.values() for wording in task.wordings for word in wording.split()}
    return tuple(sorted(wordings | set(LEXICON) | set(LEXICON.values())))


WORDS = _vocabulary_words()
LETTERS = (*string.ascii_lowercase, *string.ascii_uppercase, *string.digits)


def is_held_out(payload: str) -> bool:
    """Whether a payload is for tests alone."""
    return zlib.crc32(payload.encode()) % _OF == _HELD_OUT


def is_spelled(text: str) -> bool:
    """Whether no word of the vocabulary hides among the letters, which the tokenizer would take as one token."""
    return not any(word in text for word in WORDS)


def draw(task: Task, chance: random.Random, *, held_out: bool) -> tuple[str, str]:
    """A payload of the asked side and its right answer."""
    while True:
        payload = task.payload(chance)
        answer = task.answer(payload)
        if is_held_out(payload) == held_out and (
            task.answer is french or (is_spelled(payload.lower()) and is_spelled(answer.lower()))
        ):
            return payload, answer


def ask(parts: Sequence[tuple[str, str]]) -> str:
    """The input text of some wordings with their payloads."""
    return "; ".join(f"{wording}: {payload}" for wording, payload in parts) + " ="


def item(names: Sequence[str], chance: random.Random, *, held_out: bool) -> Item:
    """An input with one part for each named task, in that order."""
    parts, pieces = [], []
    for name in names:
        task = TASKS[name]
        payload, answer = draw(task, chance, held_out=held_out)
        parts.append((chance.choice(task.wordings), payload))
        pieces.append(answer)
    return Item(ask(parts), tuple(pieces), tuple(names))


def single(name: str, chance: random.Random, *, held_out: bool) -> Item:
    """An input of one task alone: one part, or as often two of the same task."""
    return item([name] * chance.randint(1, 2), chance, held_out=held_out)


def composed(name: str, chance: random.Random, *, held_out: bool) -> Item:
    """An input of a composition: its two tasks in either order."""
    pair = COMPOSITIONS[name] or tuple(task.name for task in chance.sample(EXPERTS, 2))
    return item(chance.sample(pair, 2), chance, held_out=held_out)


def right_pieces(answer: str, wanted: Item) -> tuple[bool, ...]:
    """For each part whether its piece of the answer is right; white space does not count."""
    given = "".join(answer.split()).split(";")
    # A piece too many makes the last one wrong: an answer that does not end is not the answer.
    whole = [*given[: len(wanted.pieces) - 1], ";".join(given[len(wanted.pieces) - 1 :])]
    whole += [""] * (len(wanted.pieces) - len(whole))
    return tuple(got == "".join(piece.split()) for got, piece in zip(whole, wanted.pieces, strict=True))


def scored(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Shares of right answers: whole ones, and pieces of them."""
    right = [right_pieces(answer, wanted) for answer, wanted in zip(answers, items, strict=True)]
    pieces = [one for row in right for one in row]
    return {"whole": sum(map(all, right)) / len(right), "pieces": sum(pieces) / len(pieces)}


def segments(tokens: Sequence[str]) -> list[int]:
    """Where each token of an input of two parts and its answer stands, as a position in SEGMENTS; -1 for <...> tokens.

    What is read last before a piece is written belongs to that piece: the sign of equality, the semicolon.
    """
    found, now = [], 0
    for token in tokens:
        if token == "=":
            now = 2
        elif token == ";" and now == 2:
            now = 3
        found.append(-1 if token.startswith("<") else now)
        if token == ";" and now == 0:
            now = 1
    return found
