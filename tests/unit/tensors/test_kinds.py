"""Files of each kind whose tensors do not belong together are refused at the tensor or field that shows it."""

import json

import numpy as np
import pytest

from moerge.errors import AdapterInvalid
from moerge.tensors import adapters, files, header, products
from moerge.tensors.bases import BaseWeights
from moerge.tensors.kind import Dense

P = "base_model.model."
Q = "layer.0.query"


def ones(*shape):
    return np.ones(shape, np.float32)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# A good file of each kind for a module of 4 outputs and 6 inputs, and what its config says beside kind and targets.
GOOD = {
    "LOHA": ({"r": 2, "alpha": 3}, {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}),
    "LOHA of a core": ({"r": 2}, {"hada_t1": (2, 2, 3, 2), "hada_w1_a": (2, 4), "hada_w1_b": (2, 6),
                                  "hada_t2": (2, 2, 3, 2), "hada_w2_a": (2, 4), "hada_w2_b": (2, 6)}),
    "LOKR": ({"r": 1, "alpha": 3}, {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3)}),
    "LOKR of a core": ({"r": 1}, {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (1, 2), "lokr_w2_b": (1, 3),
                                  "lokr_t2": (1, 1, 3, 2)}),
    "ADALORA": ({"init_r": 2, "lora_alpha": 3}, {"lora_A": (2, 6), "lora_B": (4, 2), "lora_E": (2, 1)}),
    "VERA": ({"r": 2}, {"vera_lambda_b": (4,), "vera_lambda_d": (2,), "base_model.vera_A": (2, 6),
                        "base_model.vera_B": (4, 2)}),
    "IA3": ({"feedforward_modules": []}, {"ia3_l": (4, 1)}),
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Write a good file with changed shapes (None leaves one out) and fields; returns (config, header, path)."""

    def made(name, shapes=(), /, **fields):
        raw, good = GOOD[name]
        wanted = {tensor: shape for tensor, shape in (good | dict(shapes)).items() if shape is not None}
        path = tmp_path / "adapter_model.safetensors"
        files.write(path, {tensor if tensor.startswith("base_model.") else f"{P}{Q}.{tensor}": noise(place, *shape)
                           for place, (tensor, shape) in enumerate(wanted.items())})  # fmt: skip
        config = {"peft_type": name.partition(" ")[0], "target_modules": ["query"], **raw, **fields}
        return adapters.parse_config(json.dumps(config).encode()), header.read(path), path

    return made


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_passes(name, make):
    config, head, _ = make(name)
    facts = adapters.check(config, head)
    assert facts.modules == (Q,)
    assert {blocker.needs_base for blocker in facts.blockers} <= {True}


BAD = [
    ("LOHA", {"hada_w2_a": None}, {}, Q, "w1_a, w1_b, w2_b"),
    ("LOHA", {"hada_w1_b": (3, 6)}, {}, Q, "[4, 2], [3, 6], [4, 2], [2, 6]"),
    ("LOHA", {"hada_w2_a": (5, 2)}, {}, Q, "[4, 2], [2, 6], [5, 2], [2, 6]"),
    ("LOHA", {}, {"r": 3}, "hada_w1_a", 2),
    ("LOHA of a core", {"hada_t2": None}, {}, Q, "t1, w1_a, w1_b, w2_a, w2_b"),
    ("LOHA of a core", {"hada_t1": (2, 3, 3, 2)}, {}, "hada_t1", "[2, 3, 3, 2] and [2, 6]"),
    ("LOHA of a core", {"hada_t1": (2, 2, 3)}, {}, "hada_t1", "[2, 2, 3] and [2, 6]"),
    ("LOHA of a core", {"hada_t2": (2, 2, 2, 2)}, {}, Q, "(6, 3, 2)"),
    ("LOHA of a core", {"hada_w1_a": (4, 2)}, {}, Q, "[4, 2], [2, 6], [2, 4], [2, 6]"),
    ("LOKR", {"lokr_w2_b": None}, {}, Q, "w1, w2_a"),
    ("LOKR", {"lokr_w1": None}, {}, Q, "w2_a, w2_b"),
    ("LOKR", {"lokr_w2": (2, 3)}, {}, Q, "w1, w2, w2_a, w2_b"),
    ("LOKR", {"lokr_w1": (2,)}, {}, "lokr_w1", [2]),
    ("LOKR", {"lokr_w1": (2, 2, 1, 1)}, {}, "lokr_w1", [2, 2, 1, 1]),
    ("LOKR", {"lokr_w2_b": (2, 3)}, {}, "lokr_w2_a", "[2, 1] and [2, 3]"),
    ("LOKR", {}, {"r": 2}, "lokr_w2_a", 1),
    ("LOKR of a core", {"lokr_t2": (2, 1, 3, 2)}, {}, "lokr_t2", "[2, 1, 3, 2] and [1, 3]"),
    ("LOKR of a core", {"lokr_w2_a": None, "lokr_w2_b": None, "lokr_w2": (2, 3)}, {}, Q, "t2, w1_a, w1_b, w2"),
    ("ADALORA", {"lora_E": None}, {}, Q, "A, B"),
    ("ADALORA", {"lora_E": (3, 1)}, {}, "lora_A", "A [2, 6], B [4, 2], E [3, 1]"),
    ("ADALORA", {"lora_B": (4, 3)}, {}, "lora_A", "A [2, 6], B [4, 3], E [2, 1]"),
    ("ADALORA", {}, {"init_r": 3}, "lora_A", 2),
    ("ADALORA", {}, {"init_r": 0}, "/init_r", "0"),
    ("ADALORA", {}, {"init_r": True}, "/init_r", "True"),
    ("ADALORA", {}, {"init_r": 4, "rank_pattern": {f"{Q}.lora_E": [True, False, False, False]}}, "lora_A", 2),
    ("ADALORA", {}, {"rank_pattern": {f"{Q}.lora_E": [True]}}, f"/rank_pattern/{Q}.lora_E", "[True]"),
    ("ADALORA", {}, {"rank_pattern": {f"{Q}.lora_E": 2}}, f"/rank_pattern/{Q}.lora_E", "2"),
    ("ADALORA", {}, {"rank_pattern": {f"{Q}.lora_E": [1, 1]}}, f"/rank_pattern/{Q}.lora_E", "[1, 1]"),
    ("ADALORA", {}, {"rank_pattern": [1]}, "/rank_pattern", "list"),
    ("VERA", {"vera_lambda_d": None}, {}, Q, "b"),
    ("VERA", {"vera_lambda_b": (5,)}, {}, "vera_lambda_b", "[5] and [2]"),
    ("VERA", {"vera_lambda_b": (4, 1)}, {}, "vera_lambda_b", "[4, 1] and [2]"),
    ("VERA", {"vera_lambda_d": (3,)}, {}, "vera_lambda_b", "[4] and [3]"),
    ("VERA", {}, {"r": 3}, "base_model.vera_A", "A [2, 6], B [4, 2]"),
    ("VERA", {"base_model.vera_B": (4, 3)}, {}, "base_model.vera_A", "A [2, 6], B [4, 3]"),
    ("VERA", {"base_model.vera_A": None}, {}, "/save_projection", "true"),
    ("IA3", {"ia3_l": (1, 4)}, {}, "ia3_l", [1, 4]),
    ("IA3", {"ia3_l": (4,)}, {}, "ia3_l", [4]),
    ("IA3", {"ia3_l": (2, 2)}, {}, "ia3_l", [2, 2]),
    ("IA3", {}, {"feedforward_modules": ["query"]}, "ia3_l", [4, 1]),
    ("IA3", {}, {"feedforward_modules": r".*query"}, "ia3_l", [4, 1]),
    ("IA3", {"ia3_l": (2, 2)}, {"feedforward_modules": None}, "ia3_l", [2, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shapes", "fields", "pointer", "met"), BAD)
def test_what_does_not_belong_together_is_refused_from_the_header(make, *, name, shapes, fields, pointer, met):
    config, head, _ = make(name, shapes, **fields)
    with pytest.raises(AdapterInvalid) as caught:
        adapters.check(config, head)
    error = caught.value
    assert error.pointer == (
        f"{P}{Q}.{pointer}" if "_" in pointer and pointer[0] != "/" and "." not in pointer else pointer
    )
    assert error.met == met
    assert str(error.met) in error.detail
    assert str(error.wanted) in error.detail
    assert error.remedy


def test_a_module_that_a_mask_leaves_half_its_ranks_keeps_the_scaling_of_all(make):
    config, head, _ = make("ADALORA", init_r=4, rank_pattern={f"{Q}.lora_E": [True, False, False, True]})
    facts = adapters.check(config, head)
    assert (facts.ranks, facts.scalings) == ({Q: 2}, {Q: pytest.approx(3 / 4.00001, rel=1e-12)})


def test_the_delta_of_a_kernel_without_a_name_of_its_own_waits_for_the_base(make, tmp_path):
    config, head, path = make("LOHA of a core", {"hada_t1": (2, 2, 3, 1), "hada_t2": (2, 2, 3, 1)})
    assert [(item.pointer, item.needs_base) for item in adapters.check(config, head).blockers] == [
        (f"{P}{Q}.hada_t1", True)
    ]
    for shape in ((4, 6, 3), (4, 6, 3, 1)):
        with base_of(tmp_path / str(len(shape)), {f"{Q}.weight": ones(*shape)}) as base:
            assert adapters.load(config, path, base=base).facts.layouts[Q].kernel == shape[1:]


@pytest.mark.parametrize("shape", [(3, 2, 3), (2, 3, 3)])
def test_a_kernel_that_peft_multiplies_in_another_order_is_refused_by_name(shape, make):
    config, head, _ = make("LOKR", {"lokr_w2_a": None, "lokr_w2_b": None, "lokr_w2": shape})
    assert [(item.pointer, item.needs_base) for item in adapters.check(config, head).blockers] == [
        (f"{P}{Q}.lokr_w2", False)
    ]


def test_projections_that_are_not_in_the_file_are_refused_by_name(make):
    config, head, path = make("VERA", {"base_model.vera_A": None, "base_model.vera_B": None}, save_projection=False)
    assert [item.pointer for item in adapters.check(config, head).blockers] == ["/save_projection"]
    with pytest.raises(AdapterInvalid, match="seed") as caught:
        adapters.load(config, path)
    assert "save_projection true" in caught.value.remedy


def base_of(folder, tensors):
    folder.mkdir()
    files.write(folder / "model.safetensors", tensors)
    return BaseWeights(folder)


def test_the_gains_of_ia3_are_what_it_multiplies_less_one(make, tmp_path):
    config, _, path = make("IA3")
    adapter = adapters.load(config, path)
    stored = noise(0, 4, 1).ravel()
    assert (adapter.family, dict(adapter.modules), dict(adapter.biases)) == ("ia3", {}, {})
    assert np.array_equal(adapter.gains[Q].values, stored - np.float32(1))
    assert not adapter.gains[Q].is_feedforward
    assert adapter.facts.gains == {Q: 4}
    weight, bias = noise(7, 4, 6), noise(8, 4)
    with base_of(tmp_path / "base", {f"bert.{Q}.weight": weight, f"bert.{Q}.bias": bias}) as base:
        adapter = adapters.load(config, path, base=base)
        found = adapter.modules[Q]
        assert isinstance(found, Dense)
        assert np.allclose(weight + found.values, stored[:, None] * weight, atol=1e-6)
        assert np.allclose(bias + adapter.biases[Q], stored * bias, atol=1e-6)
        assert adapter.facts.shapes == {Q: (4, 6)}


@pytest.mark.parametrize(
    ("name", "shape"), [("IA3", (5, 6)), ("VERA", (5, 6)), ("VERA", (4, 7)), ("LOKR", (6, 4)), ("ADALORA", (4, 7))]
)
def test_a_base_of_another_shape_is_refused(name, shape, make, tmp_path):
    config, _, path = make(name)
    with base_of(tmp_path / "base", {f"{Q}.weight": ones(*shape)}) as base, pytest.raises(AdapterInvalid) as caught:
        adapters.load(config, path, base=base)
    assert (caught.value.pointer, caught.value.wanted) == (Q, f"{list(shape)} (out, in)")


@pytest.mark.parametrize("name", ["IA3", "VERA"])
def test_a_base_without_the_module_is_refused(name, make, tmp_path):
    config, _, path = make(name)
    with base_of(tmp_path / "base", {"other.weight": ones(4, 6)}) as base, pytest.raises(AdapterInvalid) as caught:
        adapters.load(config, path, base=base)
    assert (caught.value.pointer, caught.value.wanted) == (Q, f"{Q}.weight")
    assert caught.value.remedy


@pytest.fixture
def dora(tmp_path):
    """Write a DoRA of one module with this magnitude; returns (config, path)."""

    def made(magnitude):
        path = tmp_path / "adapter_model.safetensors"
        named = {"lora_A.weight": noise(1, 2, 6), "lora_B.weight": noise(2, 4, 2), "lora_magnitude_vector": magnitude}
        files.write(path, {f"{P}{Q}.{name}": value for name, value in named.items()})
        raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["query"]}
        return adapters.parse_config(json.dumps(raw).encode()), path

    return made


def test_the_rows_that_dora_makes_are_as_long_as_its_magnitudes(dora, tmp_path):
    magnitude = np.array([1, 2, 3, 4], np.float32)
    config, path = dora(magnitude)
    weight, added = noise(3, 4, 6), 1.5 * noise(2, 4, 2) @ noise(1, 2, 6)
    with base_of(tmp_path / "base", {f"{Q}.weight": weight}) as base:
        adapter = adapters.load(config, path, base=base)
        tuned = weight + adapter.modules[Q].delta()
    assert np.allclose(np.linalg.norm(tuned, axis=1), magnitude, rtol=1e-5)
    directions = (weight + added) / np.linalg.norm(weight + added, axis=1, keepdims=True)
    assert np.allclose(tuned, magnitude[:, None] * directions, atol=1e-5)
    assert adapter.facts.ranks == {Q: 4}


def test_dora_is_refused_without_its_base_and_its_factors_alone_come_to_who_accepts_that(dora, tmp_path):
    config, path = dora(ones(4))
    with pytest.raises(AdapterInvalid) as caught:
        adapters.load(config, path)
    assert (caught.value.pointer, "operator" in caught.value.remedy) == ("/use_dora", True)
    found = adapters.load(config, path, accept=["/use_dora"]).modules[Q]
    np.testing.assert_allclose(found.delta(), np.float32(1.5) * (noise(2, 4, 2) @ noise(1, 2, 6)), rtol=1e-6)
    with base_of(tmp_path / "a", {"x.weight": ones(4, 6)}) as base, pytest.raises(AdapterInvalid, match="depends on"):
        adapters.load(config, path, base=base)
    with base_of(tmp_path / "b", {f"{Q}.weight": ones(6, 4)}) as base, pytest.raises(AdapterInvalid, match="not fit"):
        adapters.load(config, path, base=base)


def test_a_row_without_a_direction_and_a_magnitude_per_input_are_refused(dora, tmp_path):
    config, path = dora(ones(4))
    cancelling = -np.float32(1.5) * (noise(2, 4, 2) @ noise(1, 2, 6))
    with base_of(tmp_path / "a", {f"{Q}.weight": cancelling}) as base:
        adapter = adapters.load(config, path, base=base)
        with pytest.raises(AdapterInvalid, match="no direction") as caught:
            _ = adapter.modules[Q]
        assert caught.value.met == "row 0 of zeros"
    config, path = dora(ones(6))
    with base_of(tmp_path / "b", {f"{Q}.weight": ones(4, 6)}) as base:
        adapter = adapters.load(config, path, base=base)
        with pytest.raises(AdapterInvalid, match="one value per output"):
            _ = adapter.modules[Q]


def test_a_kronecker_product_of_products_is_the_product_of_kronecker_products():
    pairs = [(noise(1, 3, 2), noise(2, 2, 4)), (noise(3, 2, 1), noise(4, 1, 5))]
    left, right = products.kronecker(*pairs)
    assert (left.shape, right.shape) == ((6, 2), (2, 20))
    assert np.allclose(left @ right, np.kron(pairs[0][0] @ pairs[0][1], pairs[1][0] @ pairs[1][1]), atol=1e-5)


@pytest.mark.parametrize(("shapes", "rank"), [(((3, 9), (9, 5)), 3), (((5, 9), (9, 3)), 3), (((4, 2), (2, 6)), 2)])
def test_a_thin_product_has_no_rank_to_spare(shapes, rank):
    left, right = noise(1, *shapes[0]), noise(2, *shapes[1])
    found = products.thin(left, right)
    assert found[0].shape[1] == len(found[1]) == rank
    assert np.allclose(found[0] @ found[1], left @ right, atol=1e-5)
