"""The tasks, the scoring and the tables of examples/token_routing; nothing is trained here."""

import random
from itertools import pairwise

import pytest

from examples.token_routing import report, tasks
from examples.token_routing.tasks import Item

# The lexicons once more, written apart from the example's.
BY_HAND = {
    "young": """
        butterfly caterpillar, cat kitten, bear cub, cow calf, deer fawn, dog puppy, duck duckling, eagle eaglet,
        eel elver, fly maggot, frog tadpole, goat kid, goose gosling, hare leveret, hen chick, horse foal,
        kangaroo joey, owl owlet, pig piglet, pigeon squab, rabbit bunny, salmon smolt, sheep lamb, swan cygnet""",
    "capitals": """
        austria vienna, canada ottawa, china beijing, cuba havana, denmark copenhagen, egypt cairo, finland helsinki,
        france paris, germany berlin, ghana accra, greece athens, italy rome, japan tokyo, kenya nairobi, norway oslo,
        poland warsaw, portugal lisbon, russia moscow, spain madrid, sweden stockholm, thailand bangkok, turkey ankara,
        ukraine kyiv, vietnam hanoi""",
    "german": """
        apple apfel, bread brot, cabbage kohl, carrot möhre, cheese käse, cherry kirsche, cucumber gurke, egg ei,
        grape traube, honey honig, lemon zitrone, meat fleisch, milk milch, nut nuss, onion zwiebel, pear birne,
        pepper pfeffer, plum pflaume, potato kartoffel, rice reis, salt salz, strawberry erdbeere, sugar zucker,
        water wasser""",
    "symbols": """
        aluminium al, antimony sb, barium ba, bismuth bi, calcium ca, chromium cr, cobalt co, copper cu, gold au,
        iron fe, lead pb, lithium li, magnesium mg, manganese mn, mercury hg, nickel ni, palladium pd, platinum pt,
        radium ra, silver ag, sodium na, tin sn, titanium ti, zinc zn""",
}
PARTNERS = {name: dict(pair.split() for pair in text.split(",")) for name, text in BY_HAND.items()}
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty"}
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
PARTNERS["numbers"] = {str(number): word for number, word in (*enumerate(SMALL), *TENS.items())}
# What is said for a letter begins with it.
PARTNERS["spelling"] = {
    word[0]: word
    for word in (
        "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec "
        "romeo sierra tango uniform victor whiskey xray yankee zulu"
    ).split()
}
EVERY_PARTNER = {word: partner for pairs in PARTNERS.values() for word, partner in pairs.items()}
OWNER = {word: name for name, pairs in PARTNERS.items() for word in pairs}


def test_every_word_of_a_lexicon_has_the_partner_written_by_hand():
    assert {task.name: dict(task.partners) for task in tasks.TASKS} == PARTNERS


def test_no_word_stands_for_two_things_and_none_is_a_kind_or_a_mark():
    words = [word for kind in tasks.LEXICON.values() for word in kind]
    told = [*words, *tasks.LEXICON, tasks.COPY, tasks.KINDS]
    assert len(told) == len(set(told))
    assert all(len(kind) >= 20 for kind in tasks.LEXICON.values())


def test_there_are_enough_experts_and_compositions_of_two_of_them():
    names = {task.name for task in tasks.TASKS}
    pairs = [pair for pair in tasks.COMPOSITIONS.values() if pair is not None]
    assert len(names) == len(tasks.TASKS) >= 6
    assert len(pairs) >= 3
    assert all(len(set(pair)) == 2 and set(pair) <= names for pair in pairs)


@pytest.mark.parametrize("name", PARTNERS)
def test_inputs_of_one_task_have_its_words_alone_none_twice_and_the_right_answers(name):
    chance = random.Random(7)
    items = [tasks.single(name, chance, held_out=True) for _ in range(60)]
    assert {len(item.words) for item in items} == {3, 4, 5, 6}
    for item in items:
        assert item.tasks == (name,) * len(item.words)
        assert len(set(item.words)) == len(item.words)
        assert item.answers == tuple(PARTNERS[name][word] for word in item.words)
        assert item.text == " ".join(item.words) + " ="


@pytest.mark.parametrize("name", tasks.COMPOSITIONS)
def test_a_composition_has_halves_in_either_order_or_three_domains_in_turn(name):
    chance = random.Random(11)
    orders = set()
    for _ in range(60):
        item = tasks.composed(name, chance, held_out=True)
        assert item.tasks == tuple(OWNER[word] for word in item.words)
        assert item.answers == tuple(EVERY_PARTNER[word] for word in item.words)
        assert item.answer == " ".join(item.answers)
        orders.add(item.tasks)
    pair = tasks.COMPOSITIONS[name]
    if pair:
        first, second = pair
        assert orders == {(first,) * 3 + (second,) * 3, (second,) * 3 + (first,) * 3}
    else:
        assert all(len(set(order)) == 3 and order[:3] == order[3:] for order in orders)
        assert len(orders) > 20


def test_among_others_an_expert_answers_its_own_words_and_copies_those_of_every_other_kind():
    chance = random.Random(13)
    seen = set()
    for _ in range(300):
        item = tasks.among_others("symbols", chance)
        assert item.mark == "="
        assert item.answers == tuple(PARTNERS["symbols"].get(word, word) for word in item.words)
        assert not tasks.is_held_out(item.words)
        seen.update(item.words)
    assert seen > set(PARTNERS["symbols"])
    assert {kind for kind, words in tasks.LEXICON.items() if seen & set(words)} == set(tasks.LEXICON)


def test_half_of_what_an_expert_is_trained_on_is_its_task_alone():
    from examples.token_routing import experts

    chance = random.Random(17)
    alone = 0
    for _ in range(400):
        item = experts.lesson(tasks.BY_NAME["german"], chance)
        alone += set(item.words) <= set(PARTNERS["german"])
        assert item.answers == tuple(PARTNERS["german"].get(word, word) for word in item.words)
        assert not tasks.is_held_out(item.words)
    # Among others, too, three to six words are all its own in 1/4 * (1/8 + 1/16 + 1/32 + 1/64) = 6 % of the cases.
    assert 0.45 < alone / 400 < 0.62


def test_no_input_of_training_is_ever_tested():
    inputs = {
        held_out: {tasks.single("young", random.Random(number), held_out=held_out).words for number in range(300)}
        for held_out in (True, False)
    }
    assert len(inputs[True]) > 200
    assert not inputs[True] & inputs[False]
    assert all(tasks.is_held_out(words) for words in inputs[True])


ITEM = Item(("dog", "cat", "iron", "zinc"), ("puppy", "kitten", "fe", "zn"), ("young",) * 2 + ("symbols",) * 2)


@pytest.mark.parametrize(
    ("answer", "whole", "words"),
    [
        ("puppy kitten fe zn", 1, 4),
        (" puppy  kitten fe zn ", 1, 4),
        ("puppy kitten fe zn zn", 0, 4),
        ("puppy kitten fe", 0, 3),
        ("kitten fe zn", 0, 0),
        ("puppy cat iron zn", 0, 2),
        ("kitten puppy fe zn", 0, 2),
        ("", 0, 0),
    ],
)
def test_each_word_of_an_answer_counts_in_its_own_place(answer, whole, words):
    assert tasks.scored([ITEM], [answer]) == {"whole": whole, "words": words / 4}


def test_a_score_counts_whole_answers_and_words_apart():
    short = Item(("dog",), ("puppy",), ("young",))
    assert tasks.scored([ITEM, short, short], ["puppy", "puppy", "dog"]) == {"whole": 1 / 3, "words": 2 / 6}


def test_what_is_read_last_before_a_word_is_written_belongs_to_that_word():
    read = ["young", "young", "symbols", "symbols"]
    written = {"=": "young", "puppy": "young", "kitten": "symbols", "fe": "symbols", "zn": "symbols"}
    assert tasks.in_charge(ITEM) == (*read, *written.values())


# The weights of two experts, symbols and young, at the 13 tokens up to the last word of an answer of six.
SYMBOLS = [[0.0, 0.1, 0.2, 0.6, 0.7, 0.8, 0.3, 0.4, 0.5, 0.9, 0.9, 0.9, 1.0]]
NAMES = ("symbols", "young")
HALVES = Item(
    ("dog", "cat", "hen", "iron", "zinc", "tin"),
    ("puppy", "kitten", "chick", "fe", "zn", "sn"),
    ("young",) * 3 + ("symbols",) * 3,
)


def test_the_use_by_half_is_the_mean_of_the_weights_over_the_tokens_that_are_read_and_written_for_it():
    import numpy as np

    from examples.token_routing import methods

    weights = np.stack([np.array(SYMBOLS), 1 - np.array(SYMBOLS)], axis=-1)
    assert methods.use_by_half(weights, NAMES, [HALVES]) == {
        "first half read": {"first": pytest.approx(0.9), "second": pytest.approx(0.1)},
        "second half read": {"first": pytest.approx(0.3), "second": pytest.approx(0.7)},
        "first half written": {"first": pytest.approx(0.6), "second": pytest.approx(0.4)},
        "second half written": {"first": pytest.approx(0.1), "second": pytest.approx(0.9)},
    }


def test_the_right_experts_share_is_the_mean_over_tokens_up_to_the_last_word_without_padding():
    import numpy as np

    from examples.token_routing import methods

    weights = np.stack([np.array(SYMBOLS), 1 - np.array(SYMBOLS)], axis=-1)
    padded = np.concatenate([weights, np.full((1, 3, 2), 7.0)], axis=1)
    # 1 + .9 + .8 and 1 - .3, - .4, - .5 for the words of young; .6 + .7 + .8 + 3 * .9 + 1 for those of symbols.
    assert methods.right_share(padded, NAMES, [HALVES]) == pytest.approx((2.7 + 1.8 + 2.1 + 2.7 + 1.0) / 13)


def test_spread_is_the_mean_and_the_deviation_over_seeds_in_per_cent():
    assert report.spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert report.spread([0.125]) == "12.5"


def test_the_base_is_taught_to_copy_and_to_name_kinds_and_never_a_partner():
    from examples.token_routing import base

    chance = random.Random(5)
    kind_of = {word: kind for kind, words in tasks.LEXICON.items() for word in words}
    marks, kinds, neighbours = set(), set(), []
    for _ in range(300):
        lesson = base.lesson(chance)
        own = tuple(kind_of[word] for word in lesson.words)
        assert lesson.answers == {"=": lesson.words, "?": own}[lesson.mark]
        assert not tasks.is_held_out(lesson.words)
        assert len(set(lesson.words)) == len(lesson.words)
        marks.add(lesson.mark)
        kinds.update(own)
        neighbours += [left == right for left, right in pairwise(own)]
    assert marks == {"=", "?"}
    assert kinds == set(tasks.LEXICON)
    # Seven in ten go on with the kind, and one in twelve of the others by chance.
    assert 0.65 < sum(neighbours) / len(neighbours) < 0.80


def test_every_word_is_one_token(tmp_path):
    import transformers

    from examples.token_routing import base

    base.tokenizer().save_pretrained(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokens.tokenize("dog 12 möhre = puppy") == ["dog", "12", "möhre", "=", "puppy"]
    assert tokens.decode(tokens("puppy twelve carrot <eos>")["input_ids"], skip_special_tokens=True) == (
        "puppy twelve carrot"
    )
    words = [*EVERY_PARTNER, *EVERY_PARTNER.values(), *tasks.LEXICON, "=", "?"]
    found = tokens(" ".join(words))["input_ids"]
    assert len(found) == len(set(found)) == len(words)
    assert tokens.unk_token_id not in found


@pytest.mark.parametrize(
    ("learns_inputs", "learnt"),
    [
        (False, [["puppy", "<eos>"], ["puppy", "kitten", "fe", "zn", "<eos>"]]),
        (True, [["dog", "=", "puppy", "<eos>"], [*ITEM.words, "=", *ITEM.answers, "<eos>"]]),
    ],
)
def test_a_batch_has_its_loss_on_answers_and_their_end_or_on_inputs_too(learns_inputs, learnt):
    from examples.token_routing import base

    tokens = base.tokenizer()
    batch = base.batch(tokens, [Item(("dog",), ("puppy",), ("young",)), ITEM], learns_inputs=learns_inputs)
    assert learnt == [
        tokens.convert_ids_to_tokens(ids[labels != base.IGNORED].tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 10]
