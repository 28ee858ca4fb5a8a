"""Routing over the demo catalogue: 20 questions for each demo expert find that expert first.

Without data at hand the questions are those of tests/data/demo_questions.jsonl, which were written for this test. With
`--data-dir` they are also drawn from the test split of the data sets that the experts were trained on.
"""

import csv
import json
import random
import tomllib
from pathlib import Path

import pytest

from moerge.routing import cards, state
from moerge.routing.base import Query
from registry.checks import cards as uploads

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {path.parent.name: path.parent for path in sorted((ROOT / "examples" / "experts").glob("*/README.md"))}
SPECIFICATION = tomllib.loads((ROOT / "examples" / "experts.toml").read_text(encoding="utf-8"))
QUESTIONS_PER_EXPERT, WANTED_SHARE = 20, 0.80


def pytest_generate_tests(metafunc):
    if "source" in metafunc.fixturenames:
        data = metafunc.config.getoption("--data-dir")
        metafunc.parametrize(
            "source", [None, *([data] if data else [])], ids=lambda one: "test-split" if one else "own"
        )


def card_of(name):
    card = uploads.parse((FOLDERS[name] / "README.md").read_text(encoding="utf-8"))
    return cards.Card(
        expert=f"demo/{name}",
        base_model=card.base_model,
        name=name,
        description=card.description,
        examples=card.examples,
    )


def questions(name, source):
    if source is None:
        lines = (ROOT / "tests" / "data" / "demo_questions.jsonl").read_text(encoding="utf-8").splitlines()
        found = [row["text"] for row in map(json.loads, lines) if row["expert"] == name]
    else:
        found = random.Random(f"demo {name}").sample(test_rows(name, source), QUESTIONS_PER_EXPERT)
    assert len(set(found)) == QUESTIONS_PER_EXPERT
    assert not {text.casefold() for text in found} & {text.casefold() for text in card_of(name).examples}
    return found


def test_rows(name, source):
    expert = SPECIFICATION["experts"][name]
    rows = []
    for file in SPECIFICATION["data"][expert["data"]]["test"]:
        with (source / file).open(encoding="utf-8", newline="") as lines:
            rows += [row for row in csv.DictReader(lines) if row["label"] in expert.get("intents", [row["label"]])]
    return sorted({row["text"] for row in rows})


test_rows.__test__ = False


@pytest.fixture(scope="module")
def catalogue(encoder):
    entries = []
    for name in FOLDERS:
        card = card_of(name)
        entries.append(cards.entry(card, encoder.encode(cards.texts(card))))
    empty = state.State(encoder_id=encoder.id, dimension=encoder.dimension)
    return empty.changed(seq=1, put=entries)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_right_expert_comes_first(catalogue, encoder, name, source):
    asked = questions(name, source)
    missed = []
    for text, vector in zip(asked, encoder.encode(asked), strict=True):
        first = catalogue.rank(Query(text=text, vector=vector)).hits[0]
        if first.expert != f"demo/{name}":
            missed.append((text, first.expert))
    assert len(asked) - len(missed) >= WANTED_SHARE * len(asked), missed
