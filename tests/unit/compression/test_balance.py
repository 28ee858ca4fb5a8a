"""Preset hq: the product stays the same while its factors change, and what is lost of A is asked of B."""

import numpy as np
import pytest

from moerge.compression import balance, compress_adapter
from moerge.compression.codecs import compeft
from moerge.compression.reader import open_encoded
from moerge.errors import ParameterInvalid
from moerge.tensors import files
from tests.unit.compression import reference

SHAPES = [(8, 200, 160), (4, 300, 3), (6, 4, 400), (1, 50, 70)]


def pair(rank, width, height, seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(0, 0.05, (rank, width)).astype(np.float32) * np.linspace(1, 4, rank, dtype=np.float32)[:, None]
    return A, rng.normal(0, 0.01, (height, rank)).astype(np.float32)


@pytest.mark.parametrize(("rank", "width", "height"), SHAPES)
def test_balanced_factors_have_the_same_product_and_equal_shares(rank, width, height):
    A, B = pair(rank, width, height)
    first, second = balance.balanced(A, B)
    assert first.shape == A.shape
    assert second.shape == B.shape
    product = B.astype(np.float64) @ A
    np.testing.assert_allclose(second.astype(np.float64) @ first, product, atol=1e-6 * np.abs(product).max() * rank)
    strengths = np.linalg.svd(product, compute_uv=False)[:rank]
    for gram in (first @ first.T, second.T @ second):
        np.testing.assert_allclose(np.diag(gram)[: strengths.size], strengths, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-5 * strengths[0])


def test_a_compensated_factor_leaves_nothing_that_the_image_could_express():
    A, B = pair(8, 200, 160)
    image = np.where(np.abs(A) > 0.05, np.sign(A) * 0.1, 0).astype(np.float32)
    made = balance.compensated(A, B, image)
    assert made.shape == B.shape
    left = B.astype(np.float64) @ A - made.astype(np.float64) @ image
    np.testing.assert_allclose(left @ image.T, 0, atol=1e-6)
    rng = np.random.default_rng(1)
    for _ in range(5):
        other = made + rng.normal(0, 1e-3, made.shape)
        assert np.linalg.norm(B.astype(np.float64) @ A - other @ image) > np.linalg.norm(left)


def test_rows_of_the_image_may_depend_on_each_other():
    A, B = pair(4, 60, 50)
    image = np.zeros_like(A)
    image[0, :9] = image[1, :9] = 0.1
    made = balance.compensated(A, B, image)
    assert np.isfinite(made).all()
    assert not made[:, 2:].any()
    np.testing.assert_allclose(made[:, 0], made[:, 1], atol=1e-6)


def decoded(tensors, **parameters):
    found = reference.decode(compeft.encode(tensors, parameters))
    return {name: np.array(values, np.float64).reshape(shape) for name, (_, shape, values) in found.items()}


@pytest.mark.parametrize("named", [{"preset": "hq"}, {"scale_rule": "hq"}, {"preset": "hq", "scale_rule": "hq"}])
def test_the_decoded_product_is_unbiased_and_nearer_than_that_of_default(named):
    A, B = pair(8, 200, 160)
    tensors = {"m.lora_A.weight": A, "m.lora_B.weight": B}
    product = B.astype(np.float64) @ A
    cosines = {}
    for name, parameters in {"hq": named, "default": {}}.items():
        found = decoded(tensors, density=0.2, **parameters)
        made = found["m.lora_B.weight"] @ found["m.lora_A.weight"]
        assert np.sum(made * product) == pytest.approx(np.sum(product**2), rel=1e-5)
        cosines[name] = np.sum(made * product) / np.linalg.norm(made) / np.linalg.norm(product)
        for tensor in found.values():
            assert np.unique(np.abs(tensor)).size == 2
            assert np.count_nonzero(tensor) == round(0.2 * tensor.size)
    assert cosines["hq"] > cosines["default"] + 0.03


def test_b_is_made_ternary_after_it_was_solved_for_the_ternary_a():
    A, B = pair(8, 200, 160)
    found = decoded({"m.lora_A.weight": A, "m.lora_B.weight": B}, density=0.2, preset="hq")
    image, product = found["m.lora_A.weight"], B.astype(np.float64) @ A
    # The best B for what is left of A, by least squares on the dense product.
    solved = np.linalg.lstsq(image.T, product.T, rcond=None)[0].T
    seen = found["m.lora_B.weight"] != 0
    assert np.abs(solved[seen]).min() >= np.abs(solved[~seen]).max() * (1 - 1e-5)
    np.testing.assert_array_equal(np.sign(found["m.lora_B.weight"][seen]), np.sign(solved[seen]))


def test_the_file_and_the_report_name_hq_and_measure_the_original_product(tmp_path):
    A, B = pair(16, 200, 160)
    files.write(tmp_path / "in", {"base_model.model.m.lora_A.weight": A, "base_model.model.m.lora_B.weight": B})
    config = b'{"peft_type": "LORA", "r": 16}'
    reports = [compress_adapter(config, tmp_path / "in", tmp_path / out, preset="hq") for out in ("x", "y")]
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert reports[0].preset == reports[0].scale_rule == "hq"
    assert reports[0].sigma_ratio == pytest.approx(A.std() / B.std(), rel=1e-5)
    with open_encoded(tmp_path / "x") as encoded:
        assert encoded.metadata["preset"] == encoded.metadata["scale_rule"] == "hq"
        made = encoded.tensor("base_model.model.m.lora_B.weight") @ encoded.tensor("base_model.model.m.lora_A.weight")
    product = B @ A
    cosine = np.sum(made * product) / np.linalg.norm(made) / np.linalg.norm(product)
    assert reports[0].product_cosine == pytest.approx(cosine, rel=1e-4)
    assert reports[0].modules[0].rel_error == pytest.approx(
        np.linalg.norm(product - made) / np.linalg.norm(product), rel=1e-4
    )


def test_a_pair_with_a_small_factor_is_made_ternary_as_by_default():
    A, B = pair(4, 300, 3)
    tensors = {"m.lora_A.weight": A, "m.lora_B.weight": B}
    for name, values in compeft.decode(compeft.encode(tensors, {"preset": "hq"})).items():
        np.testing.assert_array_equal(values, compeft.decode(compeft.encode(tensors, {}))[name])


@pytest.mark.parametrize(
    "parameters",
    [{"preset": "hq", "scale_rule": "norm"}, {"preset": "paper", "scale_rule": "hq"}, {"preset": "hq", "alpha": 2.0}],
)
def test_settings_that_do_not_fit_together_are_refused(parameters):
    with pytest.raises(ParameterInvalid):
        compeft.settings(parameters)
