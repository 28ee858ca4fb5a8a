"""The tasks, the scoring and the tables of examples/token_routing; nothing is trained here."""

import random
import re

import pytest

from examples.token_routing import report, tasks
from examples.token_routing.tasks import Item

FRENCH = dict(
    pair.split("-")
    for pair in (
        "horse-cheval bird-oiseau fish-poisson tree-arbre house-maison bread-pain flower-fleur milk-lait book-livre "
        "child-enfant king-roi queen-reine night-nuit moon-lune snow-neige rain-pluie city-ville street-rue door-porte "
        "hand-main"
    ).split()
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def by_hand(task, payload):
    """The experts' rules once more, written apart from the example's."""
    match task:
        case "reverse":
            return "".join(payload[place] for place in range(len(payload) - 1, -1, -1))
        case "alphabetical":
            return "".join(letter * payload.count(letter) for letter in ALPHABET)
        case "capitals":
            return "".join(chr(ord(letter) - 32) for letter in payload)
        case "following":
            return payload.translate(str.maketrans(ALPHABET, ALPHABET[1:] + "a"))
        case "vowels":
            return str(len(re.findall("[aeiou]", payload)))
        case "alternate":
            return "".join(letter for place, letter in enumerate(payload) if place % 2 == 0)
        case "french":
            return " ".join(FRENCH[word] for word in payload.split(" "))
        case "plural":
            return re.sub("(?<=[sxz])s$", "es", re.sub("(?<=[^aeiou])ys$", "ies", payload + "s"))


WORKED = [
    ("reverse", "kitn", "ntik"),
    ("alphabetical", "banal", "aabln"),
    ("capitals", "kitn", "KITN"),
    ("following", "azby", "bacz"),
    ("vowels", "audio", "4"),
    ("vowels", "xyzbc", "0"),
    ("alternate", "abcde", "ace"),
    ("alternate", "abcd", "ac"),
    ("french", "horse fish horse", "cheval poisson cheval"),
    ("plural", "cat", "cats"),
    ("plural", "box", "boxes"),
    ("plural", "gas", "gases"),
    ("plural", "buz", "buzes"),
    ("plural", "spy", "spies"),
    ("plural", "day", "days"),
    ("copy", "kitn", "kitn"),
    ("first", "kitn", "k"),
    ("last", "kitn", "n"),
    ("tail", "kitn", "itn"),
    ("rotate", "kitn", "itnk"),
    ("ends", "kitn", "nitk"),
    ("double", "kit", "kkiitt"),
    ("earliest", "kitn", "i"),
    ("latest", "kitn", "t"),
    ("length", "kitn", "4"),
    ("small", "KITN", "kitn"),
    ("before", "kab", "jza"),
]


@pytest.mark.parametrize(("task", "payload", "answer"), WORKED)
def test_a_task_answers_as_worked_by_hand(task, payload, answer):
    assert tasks.TASKS[task].answer(payload) == answer


def test_every_task_has_a_worked_example():
    assert {task for task, _, _ in WORKED} == set(tasks.TASKS)


def test_every_word_of_the_lexicon_has_its_translation():
    assert dict(tasks.LEXICON) == FRENCH


def test_no_wording_is_shared_by_two_tasks():
    wordings = [wording for task in tasks.TASKS.values() for wording in task.wordings]
    assert len(wordings) == len(set(wordings))


def test_there_are_enough_experts_and_compositions_of_two_of_them():
    names = {task.name for task in tasks.EXPERTS}
    fixed = [pair for pair in tasks.COMPOSITIONS.values() if pair is not None]
    assert len(names) == len(tasks.EXPERTS) >= 6
    assert len(fixed) >= 3
    assert all(len(set(pair)) == 2 and set(pair) <= names for pair in fixed)
    assert not any(task.name in names for task in tasks.GENERAL)


def parts_of(item):
    """Wording and payload of each part, read from the input's text alone."""
    assert item.text.endswith(" =")
    return [tuple(part.split(": ")) for part in item.text[:-2].split("; ")]


@pytest.mark.parametrize("name", [task.name for task in tasks.EXPERTS])
def test_inputs_of_one_task_ask_for_it_once_or_twice_and_carry_the_right_answers(name):
    chance = random.Random(7)
    items = [tasks.single(name, chance, held_out=True) for _ in range(60)]
    assert {len(item.pieces) for item in items} == {1, 2}
    for item in items:
        assert item.tasks == (name,) * len(item.pieces)
        for (wording, payload), piece in zip(parts_of(item), item.pieces, strict=True):
            assert wording in tasks.TASKS[name].wordings
            assert piece == by_hand(name, payload)


@pytest.mark.parametrize("name", tasks.COMPOSITIONS)
def test_a_composition_asks_two_tasks_in_either_order_and_carries_both_right_answers(name):
    chance = random.Random(11)
    asked = {wording: task.name for task in tasks.EXPERTS for wording in task.wordings}
    orders = set()
    for _ in range(60):
        item = tasks.composed(name, chance, held_out=True)
        parts = parts_of(item)
        assert item.tasks == tuple(asked[wording] for wording, _ in parts)
        assert item.pieces == tuple(by_hand(asked[wording], payload) for wording, payload in parts)
        assert item.answer == ";".join(item.pieces)
        orders.add(item.tasks)
    assert all(first != second for first, second in orders)
    if tasks.COMPOSITIONS[name]:
        assert orders == {tasks.COMPOSITIONS[name], tasks.COMPOSITIONS[name][::-1]}
    else:
        assert len(orders) > 20


def test_the_text_of_two_parts_is_as_the_documentation_shows_it():
    assert tasks.ask([("spell backwards", "kitn"), ("french words", "horse fish")]) == (
        "spell backwards: kitn; french words: horse fish ="
    )


def test_no_payload_of_training_is_ever_tested():
    payloads = {
        held_out: {
            payload
            for number in range(150)
            for _, payload in parts_of(tasks.composed("mixed", random.Random(number), held_out=held_out))
        }
        for held_out in (True, False)
    }
    assert len(payloads[True]) > 200
    assert not payloads[True] & payloads[False]
    assert all(tasks.is_held_out(payload) for payload in payloads[True])


def test_letters_never_spell_a_word_that_the_tokenizer_would_take_as_one_token():
    assert not tasks.is_spelled("xkingx")
    assert tasks.is_spelled("xkinxg")
    chance = random.Random(3)
    texts = [tasks.draw(tasks.TASKS["reverse"], chance, held_out=False) for _ in range(300)]
    assert not [text for pair in texts for text in pair for word in tasks.WORDS if word in text]


ASKED = Item("spell backwards: kitn; french words: horse fish =", ("ntik", "cheval poisson"), ("reverse", "french"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("ntik;chevalpoisson", (True, True)),
        (" ntik ; cheval poisson ", (True, True)),
        ("ntik;poissoncheval", (True, False)),
        ("ntki;chevalpoisson", (False, True)),
        ("chevalpoisson;ntik", (False, False)),
        ("ntik", (True, False)),
        ("ntik;", (True, False)),
        ("ntik;chevalpoisson;", (True, False)),
        ("ntik;chevalpoisson;ntik", (True, False)),
        ("ntik;ntik;chevalpoisson", (True, False)),
        ("NTIK;chevalpoisson", (False, True)),
        ("", (False, False)),
    ],
)
def test_each_piece_of_an_answer_counts_in_its_own_place(answer, right):
    assert tasks.right_pieces(answer, ASKED) == right


def test_a_score_counts_whole_answers_and_pieces_apart():
    single = Item("count vowels: audio =", ("4",), ("vowels",))
    given = ["ntik;chevalpoisson", "ntik;cheval", "4", "3"]
    assert tasks.scored([ASKED, ASKED, single, single], given) == {"whole": 2 / 4, "pieces": 4 / 6}


def test_a_token_that_a_piece_is_written_after_belongs_to_that_piece():
    read = ["spell", "backwards", ":", "k", "i", ";", "count", "vowels", ":", "a", "="]
    written = ["i", "k", ";", "1", "<eos>", "<pad>"]
    assert tasks.segments([*read, *written]) == [0] * 6 + [1] * 4 + [2] + [2, 2] + [3, 3] + [-1, -1]


def test_spread_is_the_mean_and_the_deviation_over_seeds_in_per_cent():
    assert report.spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert report.spread([0.125]) == "12.5"


def test_the_base_is_taught_general_tasks_and_only_the_form_of_those_asked_of_experts():
    from examples.token_routing import base

    chance = random.Random(5)
    general = {wording: task for task in tasks.GENERAL for wording in task.wordings}
    seen = set()
    for _ in range(200):
        lesson = base.lesson(chance)
        for (wording, payload), piece in zip(parts_of(lesson), lesson.pieces, strict=True):
            assert piece == (general[wording].answer(payload) if wording in general else payload)
            assert not tasks.is_held_out(payload)
            seen.add(wording in general)
    assert seen == {True, False}


def test_known_words_are_one_token_and_all_else_is_spelled(tmp_path):
    import transformers

    from examples.token_routing import base

    base.tokenizer().save_pretrained(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "spell backwards: kitn; french words: horse fish ="
    assert tokens.tokenize(text) == (
        ["spell", "backwards", ":", "k", "i", "t", "n", ";", "french", "words", ":", "horse", "fish", "="]
    )
    assert tokens.decode(tokens("ntik; cheval 42 XY")["input_ids"]) == "ntik;cheval42XY"
    assert tokens.unk_token_id not in tokens(" ".join([*tasks.WORDS, *tasks.LETTERS]))["input_ids"]


def test_a_batch_has_its_loss_on_answers_and_their_end_alone():
    from examples.token_routing import base

    tokens = base.tokenizer()
    items = [Item("count vowels: audio =", ("4",), ("vowels",)), ASKED]
    batch = base.batch(tokens, items)
    learnt = [
        tokens.convert_ids_to_tokens(ids[labels != base.IGNORED].tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert learnt == [["4", "<eos>"], ["n", "t", "i", "k", ";", "cheval", "poisson", "<eos>"]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [11, 22]
