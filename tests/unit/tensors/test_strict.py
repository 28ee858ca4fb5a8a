"""Strict JSON refuses what two readers could understand differently."""

import pytest

from moerge.tensors import strict


def refused(data: bytes, **limits: int) -> strict.Malformed:
    with pytest.raises(strict.Malformed) as caught:
        strict.loads(data, **({"max_keys": 10, "max_depth": 4} | limits))
    return caught.value


def test_ordinary_json_is_read_with_its_types():
    data = b'{"a": [1, -2, 1.5, true, null, "\\u00e9\\n\\ud83d\\ude00"], "b": {}}'
    assert strict.loads(data, max_keys=2, max_depth=2) == {"a": [1, -2, 1.5, True, None, "é\n😀"], "b": {}}


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity"])
def test_words_for_numbers_are_refused(word):
    assert word.decode() in str(refused(b"[" + word + b"]"))


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1" + b"0" * 400 + b".0"])
def test_numbers_too_large_for_a_float_are_refused(number):
    assert "too large" in str(refused(number))


def test_minus_zero_is_refused_and_other_numbers_with_a_minus_are_not():
    assert "-0" in str(refused(b"[-0]"))
    assert strict.loads(b'[-0.0, -0e1, -10, -5, "-0"]', max_keys=1, max_depth=1) == [0.0, 0.0, -10, -5, "-0"]


def test_a_key_given_twice_is_refused_and_named_at_any_depth():
    error = refused(b'{"x": [{"k": 1, "l": 2, "k": 1}]}')
    assert error.pointer == "k"
    assert refused(b'{"k": 1, "\\u006b": 2}').pointer == "k"


def test_members_are_counted_over_all_objects():
    data = b'{"a": {"b": 1, "c": 2}, "d": {}}'
    assert strict.loads(data, max_keys=4, max_depth=2)
    assert "more than 3 members" in str(refused(data, max_keys=3))


def test_levels_are_counted_over_arrays_and_objects_but_not_in_strings():
    data = b'{"a": [{"b": "[[[[{{{{ \\" [["}]}'
    assert strict.loads(data, max_keys=9, max_depth=3)
    assert "more than 2 levels" in str(refused(data, max_depth=2))
    assert strict.loads(b"[[], [], [[]]]", max_keys=1, max_depth=3) == [[], [], [[]]]


def test_nesting_without_a_limit_is_refused_before_the_stack_ends():
    with pytest.raises(strict.Malformed, match="nested too deeply"):
        strict.loads(b"[" * 200_000, max_keys=1)


@pytest.mark.parametrize("data", [b'"\\ud800"', b'["a", "\\udc00\\ud800"]', b'{"\\udfff": 1}'])
def test_half_a_surrogate_pair_is_refused(data):
    assert "surrogate" in str(refused(data))


@pytest.mark.parametrize(
    "data", [b"\xff", b'"\xc3"', b"\xef\xbb\xbf{}", b"", b"{", b"[1,]", b"{'a': 1}", b'"\n"', b"01", b"9" * 5000]
)
def test_what_is_not_json_is_refused(data):
    refused(data)


@pytest.mark.parametrize("data", [b'"' * 2_000_001, b'"\\' * 1_000_000, b'"\\"' * 700_000])
def test_strings_without_end_are_refused_without_trying_every_quote(data):
    refused(data, max_depth=4)


def test_a_long_key_given_twice_does_not_fill_the_message():
    key = b'"' + b"k" * 100_000 + b'"'
    error = refused(b"{" + key + b":1," + key + b":2}")
    assert len(str(error)) < 300
    assert len(error.pointer) == 200
