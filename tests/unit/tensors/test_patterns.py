"""Patterns give the answers of Python's re, and hostile ones cost a bounded amount of work."""

import re
import sys

import pytest

from moerge.errors import ConfigInvalid
from moerge.tensors import patterns
from moerge.tensors.patterns import Budget, KeyTable

NAMES = [
    "", "q", "k_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "visual.blocks.3.attn.qkv",
    "encoder.layer.1.attention.self.query", "lm_head", "a.b.c", "axb", "x-1.y", "h.0.attn.c_attn", "AbC.Q_Proj",
]  # fmt: skip
PATTERNS = [
    "q", "axb", "a.b", r"a\.b\.c", ".*", ".+", "", "q|k_proj", r".*\.(q|k|v)_proj", r".*q_proj", r"model\.layers\.\d+\..*",
    r".*\.layers\.(1[0-9]|[2-9])\..*", r"^model.*proj$", r"(?!visual).*", r"^(?!.*visual).*(?:q_proj|qkv|query).*",
    r".*(?<=self)\.query", r".*(?<!self)\.query", r"\bmodel\b.*", r".*\Bproj", r"(?i)ABC\.q_PROJ", r"(?i:abc)\..*",
    r"[^v]+", r"[a-f.]*", r"[^\W\d]+", r"\w+\.\d+\.\w+\.\w+", r"(a|b)*", r"(?:[a-z]+\.){2}c", r"x{1,2}.*", r".{3}",
    r"(x+x+)*y?", r"h\.\d+?\.attn.*?", r"(?:a?){3}xb", r"(?=.*q_proj)model.*", r"\Amodel.*\Z", r"(a)|(b", r"[",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_re(pattern):
    try:
        compiled = re.compile(pattern)
    except re.error:
        with pytest.raises(ConfigInvalid) as caught:
            patterns.matches(pattern, "a", Budget(), whole=True, pointer="/here")
        assert (caught.value.pointer, caught.value.rule, caught.value.met) == ("/here", "J3", pattern)
        assert "List" in caught.value.remedy
        return
    for name in NAMES:
        assert patterns.matches(pattern, name, Budget(), whole=True) == bool(compiled.fullmatch(name)), name
        assert patterns.matches(pattern, name, Budget(), whole=False) == bool(compiled.match(name)), name


def peft_key(keys, module):
    """PEFT 0.21.2, peft.utils.other.get_pattern_key, in other words."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), module)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj", "layers.0.self_attn.q_proj"], ["layers.0.self_attn.q_proj", "q_proj"], ["proj"], ["a.b.c", "b.c", "c"],
        ["b.c", "c", "a.b.c"], ["a.b"], ["xb"], ["."], [".."], ["..b"], ["q"], [""], [r"layers\.\d+\..*", "q_proj"],
        ["q_proj", r"layers\.\d+\..*"], ["down_proj|q_proj"], ["a)|(b"], [r"^model.*q_proj"], ["self.query", "f.query"],
        ["c", r"b\.c"], [r"b\.c", "c"], ["absent"], [],
    ],
)  # fmt: skip
def test_the_key_for_a_module_is_the_one_peft_takes(keys):
    table = KeyTable(keys, pointer="/rank_pattern")
    for name in NAMES:
        assert table.key_for(name, Budget()) == peft_key(keys, name), name


@pytest.mark.parametrize(
    ("pattern", "why"),
    [(r"(a)\1", "groupref"), (r"(?>a+)b", "atomic"), (r"a++b", "possessive"), (r"(a)?(?(1)b|c)", "groupref exists"),
     ("(" * 2000 + ")" * 2000, ""), ("((a{1,100}){1,100}){1,100}", "too large"), ("a" * 20_000 + "*", "20000")],
)  # fmt: skip
def test_what_cannot_be_decided_in_bounded_work_is_refused_by_name(pattern, why):
    with pytest.raises(ConfigInvalid) as caught:
        patterns.matches(pattern, "aa", Budget(), whole=True)
    assert why in str(caught.value).lower()


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*a){12}b", "(?!x)(a+)+b", "(?=(a+)+c)a*"])
def test_a_pattern_that_would_take_re_for_ever_is_answered(pattern):
    assert patterns.matches(pattern, "a" * 400, Budget(), whole=True) is False


def test_work_without_end_is_cut_off_by_the_budget():
    with pytest.raises(ConfigInvalid, match="too long to match") as caught:
        patterns.matches("(?!b)" + ".*" * 5000 + "b", "a" * 500, Budget(), whole=True)
    assert caught.value.rule == "J3"


def test_one_budget_is_spent_by_all_patterns_together():
    def ask(times, budget):
        return [patterns.matches("(?!b).*proj", "q_proj", budget, whole=True) for _ in range(times)]

    assert all(ask(5, Budget(1000)))
    with pytest.raises(ConfigInvalid):
        ask(500, Budget(1000))


def test_twenty_thousand_expert_modules_fit_one_budget():
    pattern = r".*\.layers\.(1[0-9]|[0-9])\.mlp\.experts\.\d+\.(gate|up|down)_proj"
    budget = Budget()
    assert all(
        patterns.matches(pattern, f"model.layers.{layer}.mlp.experts.{expert}.up_proj", budget, whole=True)
        for layer in range(20)
        for expert in range(1000)
    )


def test_a_name_per_module_in_a_pattern_fits_one_budget():
    keys = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(20) for expert in range(100)]
    table, budget = KeyTable(keys, pointer="/rank_pattern"), Budget()
    assert all(table.key_for(key, budget) == key for key in keys)


def test_patterns_with_different_answers_in_newer_python_are_asked_of_python_itself():
    assert patterns.matches(r"\B", "", Budget(), whole=True) == bool(re.fullmatch(r"\B", ""))
    assert sys.version_info >= (3, 11)
