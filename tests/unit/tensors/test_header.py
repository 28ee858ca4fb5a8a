"""One hostile file per rule, each refused with where, what was met, what was wanted and what to do."""

import json
import pickle

import pytest
from safetensors import SafetensorError, deserialize

from moerge.errors import HeaderInvalid
from moerge.tensors import header
from tests.unit.tensors import raw

LIMITS = header.Limits()


def refused(data: bytes, limits: header.Limits = LIMITS) -> HeaderInvalid:
    with pytest.raises(HeaderInvalid) as caught:
        header.parse(data, len(data), limits)
    assert caught.value.remedy
    return caught.value


def library_accepts(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


def test_a_valid_header_gives_names_dtypes_shapes_offsets_and_metadata():
    text = {
        "__metadata__": {"format": "pt"},
        "b": raw.entry("BF16", [2, 3], [4, 16]),
        "a": raw.entry("F32", [], [0, 4]),
    }
    data = raw.dump(text, bytes(16))
    found = header.parse(data, len(data))
    assert found.metadata == {"format": "pt"}
    assert found.tensors["b"] == header.TensorInfo("b", "BF16", (2, 3), 4, 16)
    assert found.tensors["a"] == header.TensorInfo("a", "F32", (), 0, 4)
    assert (found.tensors["b"].size, found.tensors["a"].size) == (6, 1)
    assert (found.data_start, found.file_size) == (len(data) - 16, len(data))
    assert library_accepts(data)


def test_a_header_padded_with_spaces_is_read():
    data = raw.dump(json.dumps({"a": raw.entry()}) + "   ")
    assert header.parse(data, len(data)).data_start == len(data) - 4


def test_reading_a_path_reads_no_more_than_the_header(tmp_path):
    path = tmp_path / "big.safetensors"
    text = raw.dump({"a": raw.entry("F32", [2**28], [0, 2**30])}, b"")
    with path.open("wb") as stream:
        stream.write(text)
        stream.truncate(len(text) + 2**30)
    assert header.read(path).tensors["a"].size == 2**28


def test_a_header_that_claims_90_mb_is_refused_from_its_first_eight_bytes():
    with pytest.raises(HeaderInvalid) as caught:
        header.claimed_bytes((90_000_000).to_bytes(8, "little"), 10**9)
    error = caught.value
    assert (error.pointer, error.met, error.wanted) == ("header", "90000000 bytes", "at most 16777216 bytes")
    assert error.rule == "T2"
    assert "metadata" in error.remedy


def test_a_header_of_exactly_the_limit_may_be_read_and_one_byte_more_may_not():
    limits = header.Limits(header_bytes=100)
    assert header.claimed_bytes((100).to_bytes(8, "little"), 1000, limits) == 108
    with pytest.raises(HeaderInvalid):
        header.claimed_bytes((101).to_bytes(8, "little"), 1000, limits)


def test_a_header_longer_than_its_file_is_refused_and_one_that_fills_it_is_not():
    assert header.claimed_bytes((92).to_bytes(8, "little"), 100) == 100
    with pytest.raises(HeaderInvalid) as caught:
        header.claimed_bytes((93).to_bytes(8, "little"), 100)
    assert caught.value.met == "a header of 93 bytes in a file of 100 bytes"
    assert caught.value.wanted == "at most 92 bytes of header"


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 7])
def test_a_file_shorter_than_eight_bytes_is_refused(data):
    error = refused(data)
    assert (error.met, error.wanted) == (f"{len(data)} bytes", "at least 8 bytes")


def test_a_header_that_was_not_read_to_its_end_is_refused():
    data = raw.dump({"a": raw.entry()})
    with pytest.raises(HeaderInvalid) as caught:
        header.parse(data[:20], len(data))
    assert caught.value.met == "20 bytes"


@pytest.mark.parametrize(
    ("first", "what"),
    [
        (b"PK\x03\x04" + bytes(20), "a zip archive, which is how torch.save writes pickles"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive"),
        (b"\x1f\x8b\x08" + bytes(20), "a gzip file"),
        (b"GGUF\x03" + bytes(20), "a GGUF file"),
        (b"\x93NUMPY\x01\x00" + bytes(20), "a numpy file"),
        (pickle.dumps({"a": [1.0] * 20}, protocol=2), "a pickle, which can run code when it is opened"),
        (pickle.dumps({"a": [1.0] * 20}, protocol=4), "a pickle, which can run code when it is opened"),
    ],
)
def test_another_format_under_a_false_name_is_named(first, what):
    error = refused(first)
    assert (error.met, error.wanted, error.rule) == (what, "a safetensors file", "U6")


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle():
    text = json.dumps({"a": raw.entry()})
    data = raw.dump(text + " " * (0x280 - len(text)))
    assert data[:2] == b"\x80\x02"
    assert header.parse(data, len(data)).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    ("text", "wanted_in_met"),
    [
        (b"{", "Expecting"),
        (b'{"a":', "Expecting"),
        (b"{} x", "Extra data"),
        (b'{"a\xff": 1}', "not UTF-8"),
        (b'{"__metadata__": {"a": NaN}}', "NaN"),
        (b'{"__metadata__": {"a": 1e999}}', "too large"),
        (b'{"__metadata__": {"\\ud800": "b"}}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a": ' + b'{"a":' * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer"),
        (b"{}\0\0\0\0", "Extra data"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_strict_json_is_refused(text, wanted_in_met):
    error = refused(raw.dump(text, b""))
    assert wanted_in_met in error.met
    assert error.pointer == "header"


@pytest.mark.parametrize("text", [b"[]", b' {"a":1}', b'"a"', b"1", b"", b"\xef\xbb\xbf{}"])
def test_a_header_that_does_not_start_with_a_brace_is_refused(text):
    assert refused(raw.dump(text, b"")).wanted == "{ as its first byte"


def test_two_tensors_of_one_name_are_refused_though_the_library_takes_the_last():
    one = json.dumps(raw.entry())
    data = raw.dump(f'{{"layer.a":{one},"layer.a":{one}}}')
    error = refused(data)
    assert (error.pointer, error.rule) == ("layer.a", "T2")
    assert "twice" in error.met


def test_two_metadata_keys_of_one_name_are_refused():
    data = raw.dump(f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{json.dumps(raw.entry())}}}')
    assert refused(data).pointer == "k"


def test_a_repeated_field_of_a_tensor_is_refused():
    data = raw.dump('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}')
    assert refused(data).pointer == "dtype"


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "é", "a\n", "a\0", "a" * 513])
def test_a_tensor_name_outside_the_alphabet_is_refused(name):
    error = refused(raw.dump({name: raw.entry()}))
    assert error.wanted == "1 to 512 characters of A-Z a-z 0-9 _ . -"
    assert error.rule == "T2"


def test_a_tensor_name_of_512_characters_is_accepted():
    data = raw.dump({"a" * 512: raw.entry()})
    assert header.parse(data, len(data))


def test_an_unknown_field_of_a_tensor_is_refused():
    error = refused(raw.dump({"a": raw.entry(note=1)}))
    assert (error.pointer, error.wanted) == ("a", "exactly data_offsets, dtype and shape")


@pytest.mark.parametrize("claim", [1, [], None, {"dtype": "F32", "shape": [1]}])
def test_a_tensor_without_its_three_fields_is_refused(claim):
    assert refused(raw.dump({"a": claim})).pointer == "a"


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "BOOL", "F8_E4M3", "f32", "", None, 32])
def test_a_dtype_that_no_weight_has_is_refused(dtype):
    error = refused(raw.dump({"a": raw.entry(dtype)}))
    assert (error.pointer, error.wanted) == ("a", "BF16, F16, F32, F64")
    assert "quantised" in error.remedy


def test_an_encoded_file_may_hold_bytes_and_empty_tensors_and_keep_plain_tensors():
    text = {"pos": raw.entry("U8", [0], [0, 0]), "pos_len": raw.entry("I64", [1], [0, 8]),
            "plain/x.weight": raw.entry("BF16", [2], [8, 12])}  # fmt: skip
    data = raw.dump(text, bytes(12))
    assert header.parse(data, len(data), header.COMPEFT).tensors.keys() == text.keys()
    assert refused(data).rule == "T2"
    assert refused(raw.dump({"plain/../x": raw.entry()}), header.COMPEFT).pointer == "plain/../x"


@pytest.mark.parametrize(
    "shape", [[-1], [1.0], [True], ["1"], "1", None, {}, [2**31 + 1], [1] * 9, [10**30]]
)  # fmt: skip
def test_an_impossible_shape_is_refused(shape):
    error = refused(raw.dump({"a": raw.entry("F32", shape, [0, 4])}))
    assert error.pointer == "a"
    assert error.wanted == "at most 8 whole numbers from 0 to 2147483648"


def test_a_dimension_of_exactly_the_limit_is_read_and_one_more_is_not():
    data = raw.dump({"a": raw.entry("F32", [1, 4], [0, 16])}, bytes(16))
    assert header.parse(data, len(data), header.Limits(dimension=4))
    assert refused(data, header.Limits(dimension=3)).met == "[1, 4]"


def test_a_tensor_without_values_is_refused_and_sharding_is_named():
    error = refused(raw.dump({"a": raw.entry("F32", [0, 4], [0, 0])}, b""))
    assert (error.met, error.wanted) == ("[0, 4]", "every dimension at least 1")
    assert "gathered" in error.remedy


@pytest.mark.parametrize(
    "offsets", [[0], [0, 4, 8], [-4, 0], [0, 4.0], [False, 4], "04", None, {}]
)  # fmt: skip
def test_impossible_offsets_are_refused(offsets):
    error = refused(raw.dump({"a": raw.entry("F32", [1], offsets)}))
    assert (error.pointer, error.wanted) == ("a", "[start, end]")


def test_minus_zero_is_refused_because_readers_differ_on_its_type():
    data = raw.dump('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}')
    assert not library_accepts(data)
    assert "-0" in refused(data).met


@pytest.mark.parametrize("offsets", [[0, 3], [0, 8], [4, 0]])
def test_bytes_that_do_not_fit_shape_and_dtype_are_refused(offsets):
    error = refused(raw.dump({"a": raw.entry("F32", [1], offsets)}, bytes(8)))
    assert error.met == f"{offsets[1] - offsets[0]} bytes"
    assert error.wanted == "4 bytes for F32 [1]"


def test_the_item_sizes_are_those_of_the_format():
    for dtype, size in {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.items():
        data = raw.dump({"a": raw.entry(dtype, [3], [0, 3 * size])}, bytes(3 * size))
        assert header.parse(data, len(data)).tensors["a"].end == 3 * size
        assert library_accepts(data)


def test_overlapping_tensors_are_refused():
    error = refused(raw.dump({"a": raw.entry("F32", [2], [0, 8]), "b": raw.entry("F32", [1], [4, 8])}, bytes(8)))
    assert (error.pointer, error.met, error.wanted) == ("b", "start 4", "start 8")
    assert "overlap" in error.detail


def test_a_gap_between_tensors_is_refused():
    error = refused(raw.dump({"a": raw.entry("F32", [1], [0, 4]), "b": raw.entry("F32", [1], [8, 12])}, bytes(12)))
    assert (error.pointer, error.met, error.wanted) == ("b", "start 8", "start 4")
    assert "gap" in error.detail


def test_a_gap_before_the_first_tensor_is_refused():
    assert refused(raw.dump({"a": raw.entry("F32", [1], [4, 8])}, bytes(8))).met == "start 4"


def test_a_truncated_file_is_refused_with_the_remedy_to_upload_again():
    error = refused(raw.dump({"a": raw.entry("F32", [2], [0, 8])}, bytes(7)))
    assert (error.met, error.wanted) == ("7 bytes of tensors", "8 bytes")
    assert "Upload the file again" in error.remedy


def test_bytes_after_the_last_tensor_are_refused():
    error = refused(raw.dump({"a": raw.entry("F32", [2], [0, 8])}, bytes(9)))
    assert error.detail.startswith("Bytes follow the last tensor")


def test_too_many_tensors_are_refused():
    text = {f"t{n}": raw.entry("F32", [1], [4 * n, 4 * n + 4]) for n in range(4)}
    data = raw.dump(text, bytes(16))
    assert header.parse(data, len(data), header.Limits(tensor_count=4))
    error = refused(data, header.Limits(tensor_count=3))
    assert (error.met, error.wanted) == (4, "at most 3")
    assert header.Limits().tensor_count == 200_000


def test_metadata_of_more_than_64_kb_is_refused():
    def data(count):
        return raw.dump({"__metadata__": {"k": "x" * count}, "a": raw.entry()})

    good = data(63_999)
    assert header.parse(good, len(good)).metadata["k"] == "x" * 63_999
    error = refused(data(64_000))
    assert (error.pointer, error.met, error.wanted) == ("__metadata__", "64001 bytes", "at most 64000 bytes")


@pytest.mark.parametrize(
    ("metadata", "pointer"), [([], "__metadata__"), ({"k": 1}, "__metadata__/k"), ({"k": None}, "__metadata__/k")]
)
def test_metadata_that_is_not_strings_is_refused(metadata, pointer):
    error = refused(raw.dump({"__metadata__": metadata, "a": raw.entry()}))
    assert error.pointer == pointer


def test_an_error_never_repeats_more_than_a_line_of_the_file():
    error = refused(raw.dump({"\x1b[31m" * 1000: raw.entry()}))
    assert len(str(error.met)) < 400
    assert "\x1b" not in str(error.met)
