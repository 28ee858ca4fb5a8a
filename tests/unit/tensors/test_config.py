"""adapter_config.json is parsed strictly, and an error points at the field."""

import json

import pytest

from moerge.errors import ConfigInvalid
from moerge.tensors import config


def data(**fields) -> bytes:
    return json.dumps({"peft_type": "LORA", **fields}).encode()


def refused(text: bytes) -> ConfigInvalid:
    with pytest.raises(ConfigInvalid) as caught:
        config.parse(text)
    assert "adapter_config.json" in caught.value.remedy
    return caught.value


def test_every_field_is_read_and_the_rest_is_kept_as_it_was():
    raw = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6.5, "use_rslora": True, "use_dora": False, "fan_in_fan_out": True,
        "rank_pattern": {"q": 2}, "alpha_pattern": {"k": 3.5}, "target_modules": ["q", "k"], "exclude_modules": "x.*",
        "layers_to_transform": 3, "layers_pattern": "layer", "modules_to_save": ["head"], "bias": "all",
        "base_model_name_or_path": "a/b", "auto_mapping": {"parent_library": "os"}, "made_up": [1, {"x": None}],
    }  # fmt: skip
    found = config.parse(json.dumps(raw).encode())
    assert found == config.AdapterConfig(
        peft_type="LORA", r=4, lora_alpha=6.5, use_rslora=True, use_dora=False, fan_in_fan_out=True,
        rank_pattern={"q": 2}, alpha_pattern={"k": 3.5}, target_modules=("q", "k"), exclude_modules="x.*",
        layers_to_transform=(3,), layers_pattern=("layer",), modules_to_save=("head",), bias="all",
        base_model_name_or_path="a/b", raw=raw,
    )  # fmt: skip


def test_absent_and_null_fields_have_the_defaults_of_peft():
    fields = [
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "modules_to_save",
        "bias",
    ]
    for text in (data(), data(**dict.fromkeys(fields))):
        found = config.parse(text)
        assert (found.r, found.lora_alpha, found.use_rslora, found.bias) == (8, 8.0, False, "none")
        assert (found.rank_pattern, found.alpha_pattern, found.target_modules, found.modules_to_save) == (
            {},
            {},
            None,
            (),
        )


def test_the_order_of_patterns_is_kept_because_the_first_match_counts():
    assert list(config.parse(b'{"peft_type":"LORA","rank_pattern":{"b":1,"a":2}}').rank_pattern) == ["b", "a"]


@pytest.mark.parametrize(
    ("field", "value", "pointer", "wanted"),
    [
        ("r", "8", "/r", "a whole number"),
        ("r", 8.0, "/r", "a whole number"),
        ("r", True, "/r", "a whole number"),
        ("r", 0, "/r", "1 to 65536"),
        ("r", -1, "/r", "1 to 65536"),
        ("r", 65_537, "/r", "1 to 65536"),
        ("lora_alpha", "16", "/lora_alpha", "a number"),
        ("lora_alpha", True, "/lora_alpha", "a number"),
        ("lora_alpha", 0, "/lora_alpha", "a finite number above 0"),
        ("lora_alpha", -2, "/lora_alpha", "a finite number above 0"),
        ("lora_alpha", 10**400, "/lora_alpha", "a number that a float can hold"),
        ("use_rslora", 1, "/use_rslora", "true or false"),
        ("use_dora", "yes", "/use_dora", "true or false"),
        ("fan_in_fan_out", 0, "/fan_in_fan_out", "true or false"),
        ("rank_pattern", [], "/rank_pattern", "an object of patterns and numbers"),
        ("rank_pattern", {"a/b~c": "x"}, "/rank_pattern/a~1b~0c", "a whole number"),
        ("rank_pattern", {"q": 0}, "/rank_pattern/q", "1 to 65536"),
        ("rank_pattern", {"q": True}, "/rank_pattern/q", "a whole number"),
        ("alpha_pattern", {"q": 0}, "/alpha_pattern/q", "a finite number above 0"),
        ("alpha_pattern", {"q": None}, "/alpha_pattern/q", "a number"),
        ("target_modules", 5, "/target_modules", "a string or a list of strings"),
        ("target_modules", ["q", 5], "/target_modules", "a string or a list of strings"),
        ("exclude_modules", {"q": 1}, "/exclude_modules", "a string or a list of strings"),
        ("modules_to_save", [None], "/modules_to_save", "a string or a list of strings"),
        ("layers_to_transform", [1, True], "/layers_to_transform", "a whole number or a list of them"),
        ("layers_to_transform", 1.5, "/layers_to_transform", "a whole number or a list of them"),
        ("bias", "some", "/bias", "none, all or lora_only"),
        ("bias", 1, "/bias", "a string"),
        ("base_model_name_or_path", 5, "/base_model_name_or_path", "a string"),
        ("peft_type", 5, "/peft_type", "a string"),
        ("peft_type", None, "/peft_type", "a kind that PEFT knows, such as LORA"),
        ("peft_type", "", "/peft_type", "a kind that PEFT knows, such as LORA"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_or_range_is_refused_and_named(field, value, pointer, wanted):
    error = refused(data(**{field: value}))
    assert (error.pointer, error.wanted, error.rule) == (pointer, wanted, "T4")
    assert str(wanted) in error.detail


def test_the_value_met_is_shown_with_its_type_and_cut_short():
    assert refused(data(r="8")).met == "str '8'"
    assert len(refused(data(r="8" * 100_000)).met) < 120


def test_other_kinds_may_use_the_same_words_for_other_things():
    masks = {"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True, False]}, "r": 0, "bias": "vera_only"}
    found = config.parse(json.dumps(masks).encode())
    assert (found.rank_pattern, found.r, found.raw["rank_pattern"]) == ({}, 0, {"q.lora_E": [True, False]})


def test_loha_keeps_its_alpha_under_another_name():
    assert config.parse(b'{"peft_type":"LOHA","alpha":3,"lora_alpha":5}').lora_alpha == 3


def test_a_config_larger_than_256_kb_is_refused_before_it_is_parsed():
    text = data(note="x" * 255_900)
    assert len(text) < 256_000
    assert config.parse(text)
    error = refused(data(note="x" * 256_000))
    assert (error.rule, error.wanted) == ("J1", "at most 256000 bytes")


@pytest.mark.parametrize(
    ("text", "met"),
    [
        (b'{"peft_type":"LORA","r":4,"r":8}', "twice"),
        (b'{"peft_type":"LORA","lora_alpha":NaN}', "NaN"),
        (b'{"peft_type":"LORA","lora_alpha":1e400}', "too large"),
        (b'{"peft_type":"LORA","note":"\\ud800"}', "surrogate"),
        (b'{"peft_type":"LORA","note":' + b"[" * 32 + b"]" * 32 + b"}", "levels"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(10_001)) + b"}", "members"),
        (b"\x80\x04K\x01.", "UTF-8"),
        (b"", "Expecting"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_strict_json_is_refused(text, met):
    error = refused(text)
    assert met in error.met
    assert error.rule == "J1"


def test_a_key_given_twice_is_pointed_at():
    assert refused(b'{"peft_type":"LORA","r":4,"r":8}').pointer == "/r"


def test_31_levels_below_the_object_are_read():
    assert config.parse(b'{"peft_type":"LORA","note":' + b"[" * 31 + b"]" * 31 + b"}")


def test_a_config_that_is_not_an_object_is_refused():
    assert refused(b"[1]").wanted == "a JSON object"
