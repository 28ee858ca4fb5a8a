"""Arrow prototypes against numpy's SVD of the whole delta, from factors of every awkward shape."""

import json

import numpy as np
import pytest

from moerge.errors import PackInvalid
from moerge.routing import prototypes, spectra
from moerge.tensors import adapters, files
from moerge.tensors.kind import Dense, LowRank

NAME = "base_model.model.{}.{}"


def factors(rank, *, rows=48, columns=40, seed=0, scaling=0.75):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
    return LowRank(A.astype(np.float32), B.astype(np.float32), scaling)


def whole(delta):
    """Singular values and right vectors of the delta itself, formed in float64."""
    if isinstance(delta, Dense):
        return np.linalg.svd(delta.values.astype(np.float64))[1:]
    return np.linalg.svd(delta.scaling * (delta.B.astype(np.float64) @ delta.A))[1:]


def agrees(delta, *, rank):
    found = spectra.of_delta(delta)
    values, right = whole(delta)
    np.testing.assert_allclose(found.values, values[:rank], rtol=1e-6)
    assert len(found.values) == rank
    assert abs(found.direction @ right[0]) > 0.999999
    assert found.direction[np.argmax(np.abs(found.direction))] > 0
    assert np.linalg.norm(found.direction) == pytest.approx(1)
    assert found.share == pytest.approx(values[0] ** 2 / np.sum(values**2), rel=1e-6)
    shares = values[:rank] ** 2 / np.sum(values**2)
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-6)


@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (8, 8), (64, 40)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_prototype_is_the_leading_right_singular_vector(rank, kept, seed):
    agrees(factors(rank, seed=seed), rank=kept)


def test_a_rank_deficient_b_does_not_matter():
    delta = factors(8)
    delta.B[:, 5] = delta.B[:, 2] * 4
    delta.B[:, 6] = 0
    delta.A[7] = 0
    agrees(delta, rank=5)


def test_small_singular_values_survive_factors_that_share_the_size_unevenly():
    rng = np.random.default_rng(3)
    left, right = np.linalg.qr(rng.normal(size=(48, 4)))[0], np.linalg.qr(rng.normal(size=(40, 4)))[0]
    sizes = np.array([1.0, 1e-2, 1e-5, 1e-6])
    mix = rng.normal(size=(4, 4)) * np.array([1e4, 1, 1e-3, 1])
    B, A = (left * sizes) @ mix, np.linalg.inv(mix) @ right.T
    found = spectra.of_delta(LowRank(A, B, -2.0))
    np.testing.assert_allclose(found.values, 2 * sizes, rtol=1e-5)


def test_a_dense_delta_has_a_prototype_too():
    rng = np.random.default_rng(4)
    agrees(Dense(rng.normal(size=(12, 20)).astype(np.float32)), rank=12)


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_delta_of_high_rank_is_searched_for_its_leading_directions(is_dense):
    rng = np.random.default_rng(5)
    sizes = 0.9 ** np.arange(300)
    left, right = (np.linalg.qr(rng.normal(size=(310, 300)))[0] for _ in "ab")
    B, A = (left * sizes).astype(np.float32), right.T.astype(np.float32)
    delta = Dense((B @ A) * 0.5) if is_dense else LowRank(A, B, 0.5)
    found = spectra.of_delta(delta)
    assert abs(found.direction @ right[:, 0]) > 0.9999
    assert found.values[0] == pytest.approx(0.5, rel=1e-5)
    assert found.share == pytest.approx(1 / np.sum(sizes**2), rel=1e-4)
    assert found.effective_rank is None


def test_a_module_whose_delta_is_zero_has_no_prototype():
    found = prototypes.of_deltas({"a.q": factors(4), "a.v": LowRank(np.ones((2, 40), np.float32),
                                                                     np.zeros((48, 2), np.float32), 1.0)})  # fmt: skip
    assert list(found.modules) == ["a.q"]
    assert found.zero == ("a.v",)


def test_sigma_includes_the_scaling_and_the_vector_does_not_depend_on_it():
    one, other = (prototypes.of_deltas({"q": factors(4, scaling=scaling)}).modules["q"] for scaling in (0.5, 8.0))
    assert other.sigma == pytest.approx(16 * one.sigma, rel=1e-6)
    np.testing.assert_allclose(one.vector, other.vector, atol=1e-6)


def test_siblings_that_share_an_a_get_the_prototype_of_their_stacked_outputs():
    q, v = factors(4, scaling=2.0), factors(4, seed=1, rows=30, scaling=0.5)
    v.A[:] = q.A
    far = LowRank(q.A, v.B, 0.5)
    found = prototypes.of_deltas({"0.q": q, "0.v": v, "1.v": far, "0.o": factors(4, seed=9)}).modules
    stacked = np.concatenate([2.0 * q.B @ q.A, 0.5 * v.B @ v.A])
    _, values, right = np.linalg.svd(stacked.astype(np.float64))
    assert abs(found["0.q"].vector @ right[0]) > 0.99999
    np.testing.assert_array_equal(found["0.q"].vector, found["0.v"].vector)
    assert found["0.q"].sigma == pytest.approx(values[0], rel=1e-5)
    assert found["1.v"].sigma == pytest.approx(whole(far)[0][0], rel=1e-5)
    assert found["0.o"].sigma == pytest.approx(whole(factors(4, seed=9))[0][0], rel=1e-5)


def test_reading_back_gives_the_same_prototypes_in_half_precision():
    found = prototypes.of_deltas({"a.q": factors(4), "a.v": factors(3, seed=1)})
    data = prototypes.write(found, source="ab" * 32)
    assert data == prototypes.write(found, source="ab" * 32)
    back, source = prototypes.read(data)
    assert source == "ab" * 32
    assert list(back.modules) == ["a.q", "a.v"]
    for module, one in found.modules.items():
        assert back.modules[module].sigma == pytest.approx(one.sigma)
        assert back.modules[module].share == pytest.approx(one.share)
        np.testing.assert_allclose(back.modules[module].vector, one.vector, rtol=2**-11, atol=1e-7)


def test_a_damaged_file_of_prototypes_is_refused():
    data = prototypes.write(prototypes.of_deltas({"a.q": factors(4)}), source="")
    with pytest.raises(PackInvalid):
        prototypes.read(data[:-3])
    with pytest.raises(PackInvalid):
        prototypes.read(data.replace(b"arrow_sigma/a.q", b"arrow_sigmb/a.q"))


@pytest.fixture
def adapter(tmp_path):
    """An adapter on disk: config fields and tensors -> (config, path)."""

    def made(tensors, **fields):
        path = tmp_path / "adapter_model.safetensors"
        files.write(path, {NAME.format(*name): values.astype(np.float32) for name, values in tensors.items()})
        raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"], **fields}
        return adapters.parse_config(json.dumps(raw).encode()), path

    return made


def pair(module, rank, *, seed=0):
    rng = np.random.default_rng(seed)
    return {(module, "lora_A.weight"): rng.normal(size=(rank, 10)), (module, "lora_B.weight"): rng.normal(
        size=(12, rank))}  # fmt: skip


@pytest.mark.parametrize(("fields", "scaling"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5),
                                                 ({"alpha_pattern": {"q": 1}}, 0.5)])  # fmt: skip
def test_an_adapter_on_disk_uses_the_scaling_of_its_config(adapter, fields, scaling):
    tensors = pair("layer.q", 2)
    found = prototypes.of_adapter(*adapter(tensors, **fields))
    delta = scaling * tensors["layer.q", "lora_B.weight"] @ tensors["layer.q", "lora_A.weight"]
    _, values, right = np.linalg.svd(delta)
    assert found.modules["layer.q"].sigma == pytest.approx(values[0], rel=1e-5)
    assert abs(found.modules["layer.q"].vector @ right[0]) > 0.99999
    assert not found.is_approximate


def test_of_dora_the_factors_alone_are_taken_and_said_to_be_approximate(adapter):
    tensors = pair("layer.q", 2)
    plain = prototypes.of_adapter(*adapter(tensors)).modules["layer.q"]
    magnitude = {("layer.q", "lora_magnitude_vector"): np.ones(12)}
    found = prototypes.of_adapter(*adapter(tensors | magnitude, use_dora=True))
    assert found.is_approximate
    np.testing.assert_array_equal(found.modules["layer.q"].vector, plain.vector)


def test_loha_is_taken_by_its_whole_delta(adapter):
    rng = np.random.default_rng(0)
    w1a, w1b, w2a, w2b = (rng.normal(size=shape) for shape in ((12, 2), (2, 10), (12, 2), (2, 10)))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {("layer.q", name): values for name, values in zip(names, (w1a, w1b, w2a, w2b), strict=True)}
    found = prototypes.of_adapter(*adapter(tensors, peft_type="LOHA", alpha=6)).modules["layer.q"]
    _, values, right = np.linalg.svd(3.0 * (w1a @ w1b) * (w2a @ w2b))
    assert found.sigma == pytest.approx(values[0], rel=1e-5)
    assert abs(found.vector @ right[0]) > 0.99999


@pytest.mark.parametrize(
    ("tensors", "fields", "word"),
    [
        ({("layer.q", "ia3_l"): np.ones((12, 1)) * 2}, {"peft_type": "IA3", "feedforward_modules": []}, "multiplies"),
        (pair("layer.q", 2), {"init_lora_weights": "pissa"}, "changed base"),
    ],
)
def test_kinds_without_a_matrix_delta_have_none_and_say_why(adapter, tensors, fields, word):
    found = prototypes.of_adapter(*adapter(tensors, **fields))
    assert not found.modules
    assert word in found.reason


def test_prompts_have_none_and_say_why(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    files.write(path, {"prompt_embeddings": np.ones((4, 10), np.float32)})
    raw = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    found = prototypes.of_adapter(adapters.parse_config(json.dumps(raw).encode()), path)
    assert not found.modules
    assert "prompts add inputs" in found.reason
