"""What every codec of the catalogue must do."""

import numpy as np
import pytest

from moerge.compression import catalogue
from moerge.compression.base import Spec
from moerge.errors import AdapterInvalid, MoergeError, ParameterInvalid
from tests.unit.compression import samples

CODECS = catalogue()


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return CODECS[request.param]


def tensors_of(size, dtype="F32"):
    """A pair that is compressed beside tensors of the given size that are not."""
    rng = np.random.default_rng(size)
    made = samples.lora(rng, rank=4, width=256 + size, height=300, modules=("q",))
    made["base_model.model.classifier.weight"] = rng.normal(size=(size, 3)).astype(np.float32)
    made["base_model.model.classifier.bias"] = rng.normal(size=size).astype(np.float32)
    if dtype == "BF16":
        return {name: samples.bf16(values) for name, values in made.items()}
    return {name: values.astype(np.float16 if dtype == "F16" else np.float32) for name, values in made.items()}


def choices(codec):
    """Settings that make files of different sizes."""
    if any(parameter.name == "density" for parameter in codec.SPEC.parameters):
        return [{"density": density} for density in (0.01, 0.2, 0.3, 0.5, 1.0)]
    return [{}]


def bits(tensor):
    return (tensor.bits if hasattr(tensor, "bits") else tensor).tobytes()


def test_the_catalogue_holds_compeft():
    assert "compeft" in CODECS


def test_a_codec_describes_itself(codec):
    assert isinstance(codec.SPEC, Spec)
    shown = codec.SPEC.describe()
    assert shown["name"] == codec.SPEC.name
    assert shown["version"]
    assert shown["title"]
    assert shown["paper"]
    for parameter in shown["parameters"]:
        assert parameter["help"]
        assert ("choices" in parameter) == (parameter["type"] == "string")
    defaults = codec.SPEC.parse({})
    assert defaults == {parameter["name"]: parameter["default"] for parameter in shown["parameters"]}
    assert codec.SPEC.parse(dict.fromkeys(defaults)) == defaults


@pytest.mark.parametrize("size", [1, 3, 64, 101])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_names_shapes_and_dtypes_come_back(codec, size, dtype):
    tensors = tensors_of(size, dtype)
    decoded = codec.decode(codec.encode(tensors, {}))
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert samples.dtype_of(decoded[name]) == dtype
        assert samples.values_of(decoded[name]).shape == samples.values_of(tensor).shape
        assert np.isfinite(samples.values_of(decoded[name])).all()
        if "lora" not in name:
            assert bits(decoded[name]) == bits(tensor)
        else:
            assert bits(decoded[name]) != bits(tensor)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_same_input_gives_the_same_bytes_and_is_untouched(codec, dtype):
    tensors = tensors_of(64, dtype)
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    first = codec.encode(tensors, {})
    assert codec.encode(dict(reversed(tensors.items())), {}) == first
    assert {name: bits(tensor) for name, tensor in tensors.items()} == before


def test_encoding_what_was_decoded_changes_little(codec):
    tensors = tensors_of(64)
    once = codec.decode(codec.encode(tensors, {}))
    twice = codec.decode(codec.encode(once, {}))
    for name in tensors:
        np.testing.assert_array_equal(np.sign(twice[name]), np.sign(once[name]))


@pytest.mark.parametrize("size", [1, 101])
@pytest.mark.parametrize("metadata", [None, {"base_model": "an/example", "note": "é\n" * 50}])
def test_a_file_is_never_larger_than_its_bound(codec, size, metadata):
    tensors = tensors_of(size)
    for parameters in choices(codec):
        data = codec.encode(tensors, parameters, metadata=metadata)
        bound = codec.size_bound(tensors, parameters, metadata=metadata)
        assert len(data) <= bound < len(data) + 20_000


def test_a_file_is_smaller_than_its_tensors(codec):
    tensors = samples.lora(np.random.default_rng(0), rank=16, width=768, height=768)
    least = {"compeft": 25, "int4": 7}[codec.SPEC.name]
    assert len(codec.encode(tensors, {})) < sum(values.nbytes for values in tensors.values()) / least


def test_zero_in_zero_out(codec):
    tensors = {name: np.zeros_like(values) for name, values in tensors_of(3).items()}
    decoded = codec.decode(codec.encode(tensors, {}))
    assert not any(values.any() for values in decoded.values())


def test_an_adapter_twice_as_large_decodes_twice_as_large(codec):
    tensors = tensors_of(3)
    decoded = codec.decode(codec.encode(tensors, {}))
    doubled = codec.decode(codec.encode({name: 2 * values for name, values in tensors.items()}, {}))
    for name, values in decoded.items():
        np.testing.assert_allclose(doubled[name], 2 * values, rtol=1e-6)


def test_a_sign_flip_flips_what_is_decoded(codec):
    tensors = tensors_of(3)
    decoded = codec.decode(codec.encode(tensors, {}))
    flipped = codec.decode(codec.encode({name: -values for name, values in tensors.items()}, {}))
    for name, values in decoded.items():
        np.testing.assert_array_equal(flipped[name], -values)


def test_unknown_parameters_are_named(codec):
    with pytest.raises(ParameterInvalid) as caught:
        codec.encode(tensors_of(3), {"no_such_parameter": 1})
    assert caught.value.pointer == "no_such_parameter"


def test_values_that_are_not_finite_are_refused(codec):
    tensors = tensors_of(3)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = np.nan
    with pytest.raises(AdapterInvalid) as caught:
        codec.encode(tensors, {})
    assert caught.value.pointer == name


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1])
def test_a_shortened_file_is_refused(codec, cut):
    data = codec.encode(tensors_of(3), {})
    with pytest.raises(MoergeError):
        codec.decode(data[:cut])


def test_a_flipped_bit_is_noticed_or_harmless(codec):
    good = codec.encode(tensors_of(3), choices(codec)[0])
    expected = {name: bits(tensor) for name, tensor in codec.decode(good).items() if "lora" in name}
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 300):
        data = bytearray(good)
        data[position] ^= 1 << int(rng.integers(8))
        try:
            decoded = codec.decode(bytes(data))
        except MoergeError:
            continue
        # Only metadata and plain tensors, which have no hash of their own, may differ unnoticed.
        assert {name: bits(tensor) for name, tensor in decoded.items() if "lora" in name} == expected
