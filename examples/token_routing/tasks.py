"""The synthetic tasks: small lexicons, how inputs are drawn from them, what the right answer is, what counts as right.

An input is a row of words, each one token: `dog cat hen =`. The base answers with the words themselves. Each expert's
task is to answer the words of one domain with their partners: `puppy kitten chick`. A composition has words of two or
three domains, `dog cat hen france spain italy =`, and its answer is made by as many experts.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

COPY, KINDS = "=", "?"  # What ends an input, and says whether the words or the names of their kinds are asked for.
HALF = 3  # Words of a domain in an input of two domains.
OWN = 0.5  # How often a word among others is of the expert's own domain.
SEGMENTS = ("first half read", "second half read", "first half written", "second half written")
# Inputs with this remainder are for tests alone: neither base, experts nor gates see them in training.
_HELD_OUT, _OF = 0, 5


@dataclass(frozen=True)
class Task:
    """What one expert does: it answers words of the first of two kinds with their partners of the second."""

    name: str
    description: str
    kinds: tuple[str, str]
    partners: Mapping[str, str]


@dataclass(frozen=True)
class Item:
    """One input with its answer, word by word; `tasks` names the task of each word."""

    words: tuple[str, ...]
    answers: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    mark: str = COPY

    @property
    def text(self) -> str:
        return " ".join((*self.words, self.mark))

    @property
    def answer(self) -> str:
        return " ".join(self.answers)


def _pairs(text: str) -> Mapping[str, str]:
    """Of `a-b c-d` what belongs to what."""
    return MappingProxyType(dict(pair.split("-") for pair in text.split()))


TASKS = (
    Task(
        "young",
        "Says what the young of an animal is called.",
        ("animal", "young"),
        _pairs(
            "dog-puppy cat-kitten cow-calf horse-foal sheep-lamb goat-kid pig-piglet bear-cub deer-fawn duck-duckling "
            "goose-gosling hen-chick kangaroo-joey frog-tadpole eel-elver hare-leveret swan-cygnet owl-owlet "
            "rabbit-bunny pigeon-squab eagle-eaglet butterfly-caterpillar fly-maggot salmon-smolt"
        ),
    ),
    Task(
        "numbers",
        "Writes numerals out as number words.",
        ("numeral", "number"),
        _pairs(
            "0-zero 1-one 2-two 3-three 4-four 5-five 6-six 7-seven 8-eight 9-nine 10-ten 11-eleven 12-twelve "
            "13-thirteen 14-fourteen 15-fifteen 16-sixteen 17-seventeen 18-eighteen 19-nineteen 20-twenty 30-thirty "
            "40-forty 50-fifty"
        ),
    ),
    Task(
        "capitals",
        "Names the capital city of a country.",
        ("country", "capital"),
        _pairs(
            "france-paris spain-madrid italy-rome germany-berlin austria-vienna poland-warsaw greece-athens "
            "turkey-ankara egypt-cairo kenya-nairobi ghana-accra japan-tokyo china-beijing thailand-bangkok "
            "vietnam-hanoi russia-moscow ukraine-kyiv norway-oslo sweden-stockholm denmark-copenhagen finland-helsinki "
            "portugal-lisbon cuba-havana canada-ottawa"
        ),
    ),
    Task(
        "spelling",
        "Spells letters in the NATO phonetic alphabet.",
        ("letter", "code"),
        _pairs(
            "a-alpha b-bravo c-charlie d-delta e-echo f-foxtrot g-golf h-hotel i-india j-juliett k-kilo l-lima m-mike "
            "n-november o-oscar p-papa q-quebec r-romeo s-sierra t-tango u-uniform v-victor w-whiskey x-xray y-yankee "
            "z-zulu"
        ),
    ),
    Task(
        "german",
        "Translates food and drink from English into German.",
        ("food", "speise"),
        _pairs(
            "apple-apfel pear-birne cherry-kirsche plum-pflaume grape-traube strawberry-erdbeere lemon-zitrone "
            "bread-brot milk-milch cheese-käse egg-ei salt-salz pepper-pfeffer sugar-zucker water-wasser honey-honig "
            "onion-zwiebel potato-kartoffel carrot-möhre cabbage-kohl cucumber-gurke nut-nuss rice-reis meat-fleisch"
        ),
    ),
    Task(
        "symbols",
        "Gives the chemical symbol of a metal.",
        ("metal", "symbol"),
        _pairs(
            "iron-fe copper-cu silver-ag gold-au lead-pb tin-sn zinc-zn nickel-ni cobalt-co mercury-hg platinum-pt "
            "aluminium-al sodium-na calcium-ca magnesium-mg lithium-li titanium-ti chromium-cr manganese-mn barium-ba "
            "radium-ra bismuth-bi antimony-sb palladium-pd"
        ),
    ),
)
BY_NAME = MappingProxyType({task.name: task for task in TASKS})
# Every word that there is, by kind.
LEXICON = MappingProxyType(
    {kind: words for task in TASKS for kind, words in zip(
        task.kinds, (tuple(task.partners), tuple(task.partners.values())), strict=True
    )}
)  # fmt: skip

# Two halves of two domains, in either order; `alternating` takes words of any three domains in turn.
COMPOSITIONS = MappingProxyType(
    {
        "young + capitals": ("young", "capitals"),
        "spelling + symbols": ("spelling", "symbols"),
        "numbers + german": ("numbers", "german"),
        "alternating": None,
    }
)


def is_held_out(words: Sequence[str]) -> bool:
    """Whether an input is for tests alone."""
    return zlib.crc32(" ".join(words).encode()) % _OF == _HELD_OUT


def drawn(kinds: Sequence[str], chance: random.Random) -> tuple[str, ...]:
    """A word of each kind, none twice."""
    rows = {kind: iter(chance.sample(LEXICON[kind], kinds.count(kind))) for kind in dict.fromkeys(kinds)}
    return tuple(next(rows[kind]) for kind in kinds)


def item(names: Sequence[str], chance: random.Random, *, held_out: bool) -> Item:
    """An input with one word for each named task, in that order."""
    while True:
        words = drawn([BY_NAME[name].kinds[0] for name in names], chance)
        if is_held_out(words) == held_out:
            answers = tuple(BY_NAME[name].partners[word] for name, word in zip(names, words, strict=True))
            return Item(words, answers, tuple(names))


def single(name: str, chance: random.Random, *, held_out: bool) -> Item:
    """An input of one task alone."""
    return item([name] * chance.randint(3, 2 * HALF), chance, held_out=held_out)


def among_others(name: str, chance: random.Random) -> Item:
    """An input for training: words of any other kinds among those of the task, answered as the base does, copied."""
    task = BY_NAME[name]
    others = [kind for kind in LEXICON if kind != task.kinds[0]]
    while True:
        count = chance.randint(3, 2 * HALF)
        kinds = [task.kinds[0] if chance.random() < OWN else chance.choice(others) for _ in range(count)]
        words = drawn(kinds, chance)
        if not is_held_out(words):
            return Item(words, tuple(task.partners.get(word, word) for word in words))


def composed(name: str, chance: random.Random, *, held_out: bool) -> Item:
    """An input of a composition."""
    pair = COMPOSITIONS[name]
    if pair is None:
        return item(2 * chance.sample(tuple(BY_NAME), 3), chance, held_out=held_out)
    first, second = chance.sample(pair, 2)
    return item([first] * HALF + [second] * HALF, chance, held_out=held_out)


def in_charge(wanted: Item) -> tuple[str, ...]:
    """The task that each token of an input and its answer belongs to, up to the last word of the answer.

    What is read last before a word is written belongs to that word: the sign of equality, the word before.
    """
    return (*wanted.tasks, *wanted.tasks, wanted.tasks[-1])


def scored(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Shares of right answers: whole ones, and words of them, each in its own place."""
    whole, words, count = 0, 0, 0
    for wanted, answer in zip(items, answers, strict=True):
        given = tuple(answer.split())
        whole += given == wanted.answers
        words += sum(got == right for got, right in zip(given, wanted.answers, strict=False))
        count += len(wanted.answers)
    return {"whole": whole / len(items), "words": words / count}
