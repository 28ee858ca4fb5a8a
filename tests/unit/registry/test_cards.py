"""Cards: front matter, the words below it, and fields given beside the files."""

import pytest

from registry.checks import cards
from registry.checks.cards import Card, Figure
from registry.errors import UploadInvalid

FULL = """---
license: CC-BY-4.0
language: [en]
base_model: sentence-transformers/all-MiniLM-L6-v2
tags: [lora, 7]
date: 2024-05-01
moerge:
  task: Sorts tea.
  examples:
    - is this green?
    - is this black?
model-index:
  - name: tea
    results:
      - dataset: {name: Teas, type: x/teas}
        metrics:
          - {type: accuracy, name: accuracy of the expert, value: 0.75, args: {n: 200}}
          - {type: accuracy, name: accuracy of the untouched base, value: 0.5, args: {n: 200}}
          - {type: f1, name: f1, value: 0.25}
          - {type: loss, name: loss, value: .nan}
---

# Tea
"""


def test_a_full_card_is_read():
    card = cards.parse(FULL.replace("          - {type: loss, name: loss, value: .nan}\n", ""))
    assert card.description == "Sorts tea."
    assert card.examples == ("is this green?", "is this black?")
    assert card.licence == "cc-by-4.0"
    assert card.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.tags == ("lora", "7")
    assert card.figures == (Figure("Teas", "accuracy", 0.75, 0.5, 200), Figure("Teas", "f1", 0.25, None, None))
    assert card.data["date"] == "2024-05-01"
    assert card.body.strip() == "# Tea"


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(UploadInvalid):
        cards.parse(FULL)


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ("", ""),
        ("# Title\n\nFirst words\nof a line.\n\nMore.", "First words of a line."),
        ("# Title\n<!-- a comment -->\n\n[More Information Needed]\n\n- a list\n\nWords.", "Words."),
        ("---\nlicense: mit\n---\nBody words.", "Body words."),
        ("---\r\nlicense: mit\r\n---\r\n\r\nBody words.\r\n", "Body words."),
        ("---\n---\nBody words.", "Body words."),
        ("```\ncode\n```", ""),
        ("No --- front\n---\nmatter", "No --- front --- matter"),
    ],
)
def test_without_a_task_the_first_paragraph_describes(text, description):
    assert cards.parse(text).description == description


def test_the_prose_of_a_template_describes_nothing():
    template = """# Model Card for Model ID

<!-- Provide a quick summary of what the model is/does. -->

## Model Details

### Model Description

<!-- Provide a longer summary of what this model is. -->

- **Developed by:** [More Information Needed]

## Bias, Risks, and Limitations

Users should be made aware of the risks.
"""
    assert cards.parse(template).description == ""
    told = template.replace("- **Developed", "Sorts tea.\n\n- **Developed")
    assert cards.parse(told).description == "Sorts tea."


def test_tags_that_libraries_write_never_stand_in_the_way():
    card = cards.parse(f"---\ntags: [lora, {'x' * 81}, lora, true, [a], {'y' * 80}]\n---\n")
    assert card.tags == ("lora", "y" * 80)
    many = ", ".join(f"t{n}" for n in range(70))
    assert len(cards.parse(f"---\ntags: [{many}]\n---\n").tags) == 64


def test_a_card_without_front_matter_says_nothing_else():
    assert cards.parse("Words.") == Card(description="Words.", body="Words.")


def test_one_base_in_a_list_counts_and_two_do_not():
    assert cards.parse("---\nbase_model: [a/b]\n---\n").base_model == "a/b"
    assert cards.parse("---\nbase_model: [a/b, c/d]\n---\n").base_model is None


@pytest.mark.parametrize(
    "front",
    ["x: *y", "a: &b [1]\nc: [*b, *b]", "a: 1\na: 2", "a: {b: 1, b: 2}", "[", "a: !!set {b}", "a: .inf", 'x: "\\0"', "- 1", "word",
     "a: " + "[" * 2000],
)  # fmt: skip
def test_yaml_that_two_readers_see_differently_or_that_multiplies_is_refused(front):
    with pytest.raises(UploadInvalid) as error:
        cards.parse(f"---\n{front}\n---\n")
    assert error.value.faults[0].pointer == "/README.md"
    assert error.value.faults[0].remedy


def test_front_matter_has_a_size():
    cards.parse(f"---\na: {'x' * 63_000}\n---\n")
    with pytest.raises(UploadInvalid) as error:
        cards.parse(f"---\na: {'x' * 64_000}\n---\n")
    assert error.value.faults[0].wanted == "at most 64000 bytes"


@pytest.mark.parametrize(
    ("claims", "pointer"),
    [
        ({"descripton": "x"}, "/card/descripton"),
        ({"description": 5}, "/card/description"),
        ({"examples": ["x"] * 33}, "/card/examples"),
        ({"instruction": ["x"]}, "/card/instruction"),
        ({"instruction": "x" * 4001}, "/card/instruction"),
        ({"examples": ["x" * 4001]}, "/card/examples/0"),
        ({"tags": ["x" * 81]}, "/card/tags/0"),
        ({"licence": "x" * 65}, "/card/licence"),
    ],
)
def test_fields_beside_the_files_are_checked_too(claims, pointer):
    with pytest.raises(UploadInvalid) as error:
        cards.overrides(claims)
    assert error.value.faults[0].pointer == pointer


def test_an_instruction_is_read_from_the_front_matter_and_beside_it():
    card = cards.parse("---\nmoerge:\n  instruction: ' Book it. '\n---\n")
    assert card.instruction == "Book it."
    assert cards.merged(card, cards.overrides({"instruction": "Cook it."})).instruction == "Cook it."
    assert cards.merged(card, cards.overrides({"instruction": ""})).instruction == "Book it."
    with pytest.raises(UploadInvalid) as error:
        cards.parse("---\nmoerge:\n  instruction: {a: b}\n---\n")
    assert error.value.faults[0].pointer == "/README.md/moerge/instruction"


def test_fields_beside_the_files_win_and_empty_ones_do_not():
    given = cards.overrides({"description": "B", "licence": "MIT", "tags": [], "base_model": None})
    card = cards.merged(Card(description="A", licence="x", tags=("t",), base_model="a/b"), given)
    assert (card.description, card.licence, card.tags, card.base_model) == ("B", "mit", ("t",), "a/b")
