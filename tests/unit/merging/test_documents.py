"""Recipes as texts: what YAML and JSON mean, that both mean the same, and what is no recipe."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.errors import RecipeInvalid
from moerge.merging import documents, recipe

TEXT = """
# A mixture.
method: ties
parameters: {density: 3e-1, scale: 1, normalize: true}
seed: 7
experts:
  - {expert: me/a, revision: main, digest: aa, weight: 0.5}
  - expert: "no"      # a word, and no truth value
    revision: 1a2b3c
    digest: 'bb'
    weight: -2
output:
  kind: full
  dtype: ~
"""


def test_yaml_is_read_as_plain_data():
    assert documents.read(TEXT) == {
        "method": "ties",
        "parameters": {"density": 0.3, "scale": 1, "normalize": True},
        "seed": 7,
        "experts": [
            {"expert": "me/a", "revision": "main", "digest": "aa", "weight": 0.5},
            {"expert": "no", "revision": "1a2b3c", "digest": "bb", "weight": -2},
        ],
        "output": {"kind": "full", "dtype": None},
    }


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-5", 1e-5), ("-.5", -0.5), ("1.", 1.0), ("+3", 3), ("007", 7), ("12:30", "12:30"), ("on", "on"),
        ("yes", "yes"), ("0x10", "0x10"), ("2026-01-01", "2026-01-01"), ("True", True), ("null", None), ("", None),
        ("'1'", "1"), ("1_000", "1_000"), ("<<", "<<"), ("0123456789012345678901234567890123456789", "0123456789" * 4),
    ],
)  # fmt: skip
def test_words_mean_what_they_mean_in_yaml_1_2(word, value):
    found = documents.read(f"a: {word}\n")["a"]
    assert found == value
    assert type(found) is type(value)


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.:# éß\"'", min_size=1, max_size=12)
weights = st.one_of(st.integers(-5, 5), st.floats(-1e3, 1e3, allow_nan=False))


@st.composite
def bodies(draw):
    experts = draw(st.lists(st.tuples(names, names, names, weights), min_size=1, max_size=4))
    fields = ("expert", "revision", "digest", "weight")
    body = {
        "method": "dare",
        "parameters": {"density": draw(st.floats(1e-6, 1)), "scale": draw(weights)},
        "seed": draw(st.integers(0, 2**63 - 1)),
        "experts": [dict(zip(fields, expert, strict=True)) for expert in experts],
        "output": draw(
            st.sampled_from([{}, {"kind": "lora", "rank": {"energy": 0.95}}, {"kind": "full", "dtype": None}])
        ),
    }
    return {key: body[key] for key in draw(st.permutations(sorted(body)))}


@settings(max_examples=60, deadline=None)
@given(bodies(), st.booleans(), st.sampled_from([None, False, True]))
def test_yaml_and_json_of_one_recipe_have_one_digest(body, as_bytes, flow):
    text = yaml.safe_dump(body, allow_unicode=True, default_flow_style=flow, sort_keys=False)
    other = json.dumps(body, ensure_ascii=False)
    if as_bytes:
        text, other = text.encode(), other.encode()
    assert documents.read(text, kind="yaml") == body
    digests = {
        recipe.parse(given_).digest
        for given_ in (
            body,
            documents.read(text, kind="yaml"),
            documents.read(other),
            documents.read(other, kind="json"),
        )
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("text", "line", "pointer", "part"),
    [
        ("method: ties\nmethod: linear\n", 2, "", "'method' appears twice"),
        ("a:\n  b: {c: 1,\n      c: 2}\n", 3, "/a/b", "'c' appears twice"),
        ("a: &x [1]\nb: *x\n", 1, "/a", "anchor"),
        ("b: *x\n", 1, "/b", "alias"),
        ("a:\n- !!python/object/apply:os.system [ls]\n", 2, "/a/0", "tag"),
        ("a: !!float 1\n", 1, "/a", "tag"),
        ("!local\na: 1\n", 1, "", "tag"),
        ("a: 1\n---\na: 2\n", 2, "", "second document"),
        ("a: .nan\n", 1, "/a", "not finite"),
        ("a: [0, -.inf]\n", 1, "/a/1", "not finite"),
        ("a: 1e999\n", 1, "/a", "too large"),
        ("a:\n  1: b\n", 2, "/a", "key is no text"),
        ("? [a]\n: b\n", 1, "", "key is no text"),
        ("a: [1, 2\nb: 3\n", 2, "", "not YAML"),
        ("a: b\n\tc: d\n", 2, "", "not YAML"),
        ("a: b\nc: \x07\n", 2, "", "does not allow"),
        ("a: " + "[" * 32 + "]" * 32, 1, None, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_refused_with_its_line(text, line, pointer, part):
    with pytest.raises(RecipeInvalid) as error:
        documents.read(text, kind="yaml")
    assert error.value.detail.startswith(f"Line {line}: ")
    assert part in error.value.detail
    assert pointer is None or error.value.pointer == pointer


def test_values_may_be_nested_as_deeply_as_is_said():
    found, depth = documents.read("a: " + "[" * 31 + "]" * 31)["a"], 2
    while found:
        found, depth = found[0], depth + 1
    assert depth == documents.DEEPEST


@pytest.mark.parametrize("text", [b"a: \xff", "- method\n", "", "just a text", "[1]", b"{}x", '{"a": 1, "a": 2}', '{"a": NaN}',
                                  '{"a": "\\ud800"}'])  # fmt: skip
def test_what_is_no_recipe_at_all_is_refused(text):
    with pytest.raises(RecipeInvalid):
        documents.read(text)


def test_long_texts_and_many_values_are_refused_before_they_are_built():
    with pytest.raises(RecipeInvalid, match="too long") as error:
        documents.read("a: " + "x" * documents.LARGEST_BYTES)
    assert error.value.wanted == "at most 262144 bytes"
    for text in ("a: [" + "1," * 30_000 + "]", "{" + ",".join(f'"{n}":1' for n in range(20_001)) + "}"):
        with pytest.raises(RecipeInvalid, match=r"too many|more than"):
            documents.read(text)


def test_the_kind_is_taken_from_the_first_character_unless_it_is_given():
    assert documents.read('  {"a": 1e-5}') == {"a": 1e-5}
    assert documents.read("{a: 1}", kind="yaml") == {"a": 1}
    with pytest.raises(RecipeInvalid, match="not strict JSON"):
        documents.read("{a: 1}")
    with pytest.raises(RecipeInvalid, match="not strict JSON"):
        documents.read("a: 1", kind="json")


def test_both_parsers_of_yaml_read_the_same(monkeypatch):
    found = documents.read(TEXT)
    monkeypatch.setattr(documents, "_LOADER", yaml.SafeLoader)
    assert documents.read(TEXT) == found
    with pytest.raises(RecipeInvalid, match=r"^Line 2: .*twice"):
        documents.read("a: 1\na: 2")
