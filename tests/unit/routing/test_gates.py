"""Gate files: what fits the adapter is read as it is, everything else is refused by name."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from moerge.errors import GatesInvalid
from moerge.routing import gates
from moerge.routing.gates import About

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: (12, 8), V: (4, 8)}
SAID = {"method": "phatgoose", "steps": "100", "lr": "0.001", "dataset": "tea", "base_model": "acme/base@main"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / gates.FILE


def two(**changes):
    rng = np.random.default_rng(0)
    found = {Q: rng.normal(size=8).astype(np.float32), V: rng.normal(size=8).astype(np.float16)}
    return {name: values for name, values in {**found, **changes}.items() if values is not None}


def refused(path, tensors, metadata=SAID, shapes=SHAPES):
    save_file(tensors, path, metadata)
    with pytest.raises(GatesInvalid) as caught:
        gates.load(path, shapes=shapes)
    assert caught.value.remedy
    assert str(caught.value.met) in caught.value.detail
    assert str(caught.value.wanted) in caught.value.detail
    return caught.value


def test_gates_are_read_as_they_were_written(path):
    save_file(two(), path, SAID)
    found, about = gates.load(path, shapes=SHAPES)
    assert list(found) == [Q, V]
    for module, values in two().items():
        np.testing.assert_array_equal(found[module], values.astype(np.float32))
    assert about == About(method="phatgoose", steps=100, lr=0.001, dataset="tea", base_model="acme/base@main")


def test_names_may_keep_the_beginning_that_peft_gives_them(path):
    save_file({f"base_model.model.{name}": values for name, values in two().items()}, path, SAID)
    assert list(gates.load(path, shapes=SHAPES)[0]) == [Q, V]


def test_a_module_without_a_gate_is_allowed(path):
    save_file(two(**{V: None}), path, {"method": "phatgoose"})
    found, about = gates.load(path, shapes=SHAPES)
    assert list(found) == [Q]
    assert about == About(method="phatgoose")


def test_what_is_saved_can_be_loaded(path):
    about = About(method="phatgoose", steps=3, lr=1e-3, base_model="acme/base")
    gates.save(path, two(), about)
    found, back = gates.load(path, shapes=SHAPES)
    assert list(found) == [Q, V]
    assert back == about


def test_a_gate_without_a_module_is_refused_by_name(path):
    error = refused(path, two(**{"model.layers.9.q_proj": np.ones(8, np.float32)}))
    assert error.pointer == "model.layers.9.q_proj"
    assert Q in error.wanted


@pytest.mark.parametrize("shape", [(7,), (12,), (1, 8), (8, 1)])
def test_a_gate_of_the_wrong_width_is_refused(path, shape):
    error = refused(path, two(**{V: np.ones(shape, np.float32)}))
    assert (error.pointer, error.met, error.wanted) == (V, list(shape), [8])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(path, value):
    values = np.ones(8, np.float32)
    values[5] = value
    assert refused(path, two(**{Q: values})).pointer == Q


def test_a_gate_of_zeros_is_refused(path):
    error = refused(path, two(**{V: np.zeros(8, np.float16)}))
    assert error.pointer == V
    assert "norm" in error.wanted


def test_another_dtype_than_float16_and_float32_is_refused(path):
    assert refused(path, two(**{V: np.ones(8)})).met == "F64"


def test_two_names_for_one_module_are_refused(path):
    error = refused(path, two(**{f"base_model.model.{Q}": np.ones(8, np.float32)}))
    assert error.pointer in {Q, f"base_model.model.{Q}"}


def test_a_file_without_gates_is_refused(path):
    refused(path, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "arrow"), ("method", ""), ("steps", "0"), ("steps", "1.5"), ("steps", "-3"), ("lr", "0"),
     ("lr", "nan"), ("lr", "inf"), ("lr", "fast")],
)  # fmt: skip
def test_metadata_that_makes_no_sense_is_refused_by_field(path, field, value):
    assert refused(path, two(), {**SAID, field: value}).pointer == f"__metadata__/{field}"


def test_gates_that_do_not_say_their_method_are_refused(path):
    assert refused(path, two(), {"steps": "3"}).pointer == "__metadata__/method"


def test_without_an_adapter_at_hand_the_rest_is_checked(path):
    save_file(two(), path, SAID)
    assert list(gates.load(path)[0]) == [Q, V]
    refused(path, two(**{V: np.ones((2, 4), np.float32)}), shapes=None)
    refused(path, two(**{V: np.ones((), np.float32)}), shapes=None)
