"""The presets, against straightforward dense arithmetic and by hand."""

import numpy as np
import pytest

from moerge.compression import published
from moerge.compression.codecs import compeft
from moerge.compression.codecs.compeft import Arrays
from moerge.compression.presets import Ternariser, chosen
from moerge.errors import AdapterInvalid, ParameterInvalid
from tests.unit.compression import samples

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def sparse(values, density):
    """Signs of the largest values and their mean magnitude, by a stable sort."""
    flat = values.reshape(-1)
    count = max(1, int(np.floor(flat.size * density + 0.5)))
    order = np.argsort(-np.abs(flat), kind="stable")[:count]
    signs = np.zeros(flat.size)
    signs[order] = np.sign(flat[order])
    return signs.reshape(values.shape), np.abs(flat[signs != 0].astype(np.float64)).mean()


def expected_scales(a, b, density, rule):
    signs_a, mean_a = sparse(a, density)
    signs_b, mean_b = sparse(b, density)
    product, image = b.astype(np.float64) @ a, (signs_b * mean_b) @ (signs_a * mean_a)
    unbiased = (product**2).sum() / (product * image).sum()
    norm = np.sqrt((product**2).sum() / (image**2).sum())
    factor = {
        "unbiased": min(unbiased, 4 * norm),
        "norm": norm,
        "proj": (product * image).sum() / (image**2).sum(),
        "geo": np.sqrt(min(unbiased, 4 * norm) * norm),
        "mse": 1.0,
    }[rule]
    return signs_a * mean_a * np.sqrt(factor), signs_b * mean_b * np.sqrt(factor)


@pytest.mark.parametrize("rule", ["unbiased", "norm", "proj", "geo", "mse"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_a_lora_pair_is_kept_and_scaled_as_a_product(rule, density):
    tensors = samples.lora(np.random.default_rng(4), modules=("q",))
    decoded = compeft.decode(compeft.encode(tensors, {"density": density, "scale_rule": rule}))
    want_a, want_b = expected_scales(tensors[A], tensors[B], density, rule)
    np.testing.assert_allclose(decoded[A], want_a, rtol=2e-6)
    np.testing.assert_allclose(decoded[B], want_b, rtol=2e-6)


def test_the_default_is_unbiased_along_the_original_product():
    tensors = samples.lora(np.random.default_rng(8), modules=("q",))
    decoded = compeft.decode(compeft.encode(tensors, {"density": 0.2}))
    assert np.count_nonzero(decoded[A]) == 320
    assert np.count_nonzero(decoded[B]) == 256
    product = tensors[B].astype(np.float64) @ tensors[A]
    image = decoded[B].astype(np.float64) @ decoded[A]
    assert (product * image).sum() == pytest.approx((product**2).sum(), rel=1e-5)


def test_modules_do_not_share_a_threshold():
    rng = np.random.default_rng(1)
    tensors = samples.lora(rng, modules=("q",)) | samples.lora(rng, modules=("v",), a=50, b=100)
    together = compeft.decode(compeft.encode(tensors, {"density": 0.1}))
    alone = compeft.decode(compeft.encode({A: tensors[A], B: tensors[B]}, {"density": 0.1}))
    np.testing.assert_array_equal(together[A], alone[A])
    np.testing.assert_array_equal(together[B], alone[B])


def test_a_factor_too_small_to_compress_stays_and_takes_part_in_the_product():
    tensors = samples.lora(np.random.default_rng(3), rank=8, width=300, height=100, modules=("q",))
    assert tensors[B].size == 800
    decoded = compeft.decode(compeft.encode(tensors, {"density": 0.2}))
    np.testing.assert_array_equal(decoded[B], tensors[B])
    product = tensors[B].astype(np.float64) @ tensors[A]
    image = tensors[B].astype(np.float64) @ decoded[A]
    assert (product * image).sum() == pytest.approx((product**2).sum(), rel=1e-5)


def test_factors_of_convolutions_and_embeddings_are_pairs_too():
    rng = np.random.default_rng(3)
    tensors = {
        "m.conv.lora_A.weight": rng.normal(size=(4, 40, 3, 3)).astype(np.float32),
        "m.conv.lora_B.weight": rng.normal(size=(300, 4, 1, 1)).astype(np.float32),
        "m.words.lora_embedding_A": rng.normal(size=(4, 500)).astype(np.float32),
        "m.words.lora_embedding_B": rng.normal(size=(260, 4)).astype(np.float32),
    }
    decoded = compeft.decode(compeft.encode(tensors, {"density": 0.3}))
    for one, two in (
        ("m.conv.lora_A.weight", "m.conv.lora_B.weight"),
        ("m.words.lora_embedding_A", "m.words.lora_embedding_B"),
    ):
        assert decoded[one].shape == tensors[one].shape
        product, image = (
            source[two].reshape(-1, 4).astype(np.float64) @ source[one].reshape(4, -1) for source in (tensors, decoded)
        )
        assert (product * image).sum() == pytest.approx((product**2).sum(), rel=1e-5)


def test_what_is_no_lora_factor_stays_as_it_is():
    rng = np.random.default_rng(0)
    head = rng.normal(size=(77, 64)).astype(np.float32)
    others = {
        "base_model.model.classifier.weight": head,
        "base_model.model.q.lora_B.bias": rng.normal(size=2000).astype(np.float32),
        "base_model.model.q.lora_magnitude_vector": rng.normal(size=2000).astype(np.float16),
        "base_model.model.ia3_l": samples.bf16(head),
        "base_model.model.double.lora_A.weight": rng.normal(size=(4, 500)),
    }
    data = compeft.encode(samples.lora(rng) | others, {})
    decoded = compeft.decode(data)
    for name, tensor in others.items():
        assert samples.dtype_of(decoded[name]) == samples.dtype_of(tensor)
        if name.endswith("ia3_l"):
            np.testing.assert_array_equal(decoded[name].bits, tensor.bits)
        else:
            np.testing.assert_array_equal(decoded[name], tensor)


def test_other_tensors_are_compressed_from_their_initial_value_when_asked():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 30)).astype(np.float32)
    change = rng.normal(0, 0.01, size=(40, 30)).astype(np.float32)
    tensors = {"w": base + change, "ia3": (1 + 0.1 * rng.normal(size=2000)).astype(np.float32)}
    data = compeft.encode(tensors, {"density": 0.25}, initial={"w": base, "ia3": 1})
    decoded = compeft.decode(data, initial=lambda name: base)
    for name, start in (("w", base), ("ia3", np.float32(1))):
        before, after = (source[name] - start for source in (tensors, decoded))
        signs, _ = sparse(before, 0.25)
        np.testing.assert_array_equal(np.sign(np.round(after, 6)), signs)
        if name == "ia3":
            # A vector that multiplies keeps its norm, a difference from the base its length along itself.
            assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), rel=1e-4)
        else:
            assert np.sum(after * before) == pytest.approx(np.sum(before**2), rel=1e-4)


def test_a_rule_that_is_asked_for_holds_for_tensors_alone_too():
    values = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    signs, mean = sparse(values, 0.2)
    decoded = compeft.decode(compeft.encode({"w": values}, {"scale_rule": "mse"}, initial={"w": 0}))
    np.testing.assert_allclose(decoded["w"], signs * mean, rtol=1e-6)
    decoded = compeft.decode(compeft.encode({"w": values}, {"scale_rule": "unbiased"}, initial={"w": 0}))
    assert (decoded["w"].astype(np.float64) * values).sum() == pytest.approx(
        (values.astype(np.float64) ** 2).sum(), rel=1e-5
    )


def test_paper_has_one_threshold_and_one_scale_over_all_tensors():
    tensors = samples.lora(np.random.default_rng(6), rank=4, width=30, height=20)
    decoded = compeft.decode(compeft.encode(tensors, {"preset": "paper", "density": 0.2, "alpha": 2.5}))
    flat = np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])
    got = np.concatenate([decoded[name].reshape(-1) for name in sorted(tensors)])
    threshold = np.sort(np.abs(flat))[flat.size - int(flat.size * 0.2) - 1]
    expected = np.where(np.abs(flat) >= threshold, np.sign(flat) * 2.5 * flat.std(ddof=1, dtype=np.float64), 0)
    assert np.count_nonzero(got) == int(flat.size * 0.2) + 1
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_paper_is_the_published_function():
    tensors = samples.lora(np.random.default_rng(7), rank=2, width=9, height=33)
    tensors[A][0, :5] = tensors[B][3, 0]
    for mode, parameters in ((1.0, {}), (3.0, {"alpha": 3}), (published.STC, {"scale_rule": "stc"})):
        expected = published.compress(tensors, density=0.3, mode=mode)
        decoded = compeft.decode(compeft.encode(tensors, {"preset": "paper", "density": 0.3} | parameters))
        for name, values in expected.items():
            np.testing.assert_array_equal(decoded[name], values)


def test_a_negative_published_scale_turns_signs_round():
    values = np.array([-5, -4, 1, 0.5], np.float32)
    out = published.compress({"x": values}, density=0.5, mode=published.STC)
    assert out["x"].tolist() == pytest.approx([8 / 3, 8 / 3, -8 / 3, 0])
    decoded = compeft.decode(
        compeft.encode({"x": values}, {"preset": "paper", "scale_rule": "stc", "density": 0.5}, initial={"x": 0})
    )
    np.testing.assert_array_equal(decoded["x"], out["x"])


def test_pruning_keeps_magnitudes_and_density_one_keeps_everything():
    values = np.array([-5, -4, 1, 0.5], np.float32)
    assert published.compress({"x": values}, density=0.25, mode=published.PRUNE)["x"].tolist() == [-5, -4, 0, 0]
    assert published.compress({"x": values}, density=1, mode=2.0)["x"].tolist() == values.tolist()
    with pytest.raises(ParameterInvalid, match="density 1"):
        compeft.encode({A: values}, {"preset": "paper", "density": 1})


def test_a_zero_b_makes_the_pair_zero():
    tensors = samples.lora(np.random.default_rng(3), modules=("q",))
    tensors[B][:] = 0
    decoded = compeft.decode(compeft.encode(tensors, {}))
    assert not decoded[A].any()
    assert not decoded[B].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scales_at_the_ends_of_a_dtype_stay_in_it(dtype):
    info = np.finfo(dtype)
    for value in (info.smallest_subnormal, info.max):
        values = np.full(2000, value, dtype)
        decoded = compeft.decode(
            compeft.encode({"w": values}, {"scale_rule": "norm", "density": 0.1}, initial={"w": 0})
        )
        assert np.isfinite(decoded["w"]).all()
        assert np.count_nonzero(decoded["w"]) == 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_values_that_are_not_finite_are_refused_by_name(bad, preset):
    tensors = samples.lora(np.random.default_rng(3))
    tensors[B].reshape(-1)[77] = bad
    with pytest.raises(AdapterInvalid, match="index 77") as caught:
        compeft.encode(tensors, {"preset": preset})
    assert caught.value.pointer == B


def test_factors_that_do_not_fit_are_refused():
    tensors = {A: np.ones((8, 200), np.float32), B: np.ones((200, 7), np.float32)}
    with pytest.raises(AdapterInvalid, match="do not fit together"):
        compeft.encode(tensors, {})


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({"preset": "fast"}, "preset"),
        ({"density": 0}, "density"),
        ({"density": 1.01}, "density"),
        ({"density": True}, "density"),
        ({"density": "0.2"}, "density"),
        ({"density": float("nan")}, "density"),
        ({"scale_rule": "best"}, "scale_rule"),
        ({"scale_rule": "sigma"}, "scale_rule"),
        ({"preset": "paper", "scale_rule": "unbiased"}, "scale_rule"),
        ({"alpha": 1}, "alpha"),
        ({"preset": "paper", "alpha": 0}, "alpha"),
        ({"preset": "paper", "scale_rule": "stc", "alpha": 2}, "alpha"),
        ({"k": 20}, "k"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameters, pointer):
    with pytest.raises(ParameterInvalid) as caught:
        compeft.encode(samples.lora(np.random.default_rng(0)), parameters)
    assert caught.value.pointer == pointer
    assert caught.value.wanted


def test_losses_are_those_of_what_a_reader_decodes():
    tensors = {name: samples.bf16(values) for name, values in samples.lora(np.random.default_rng(9)).items()}
    source = Arrays(tensors)
    wanted = compeft.settings({"density": 0.15})
    ternariser = Ternariser(source, chosen(source, "default", {}), wanted)
    for _ in ternariser:
        pass
    ledger = ternariser.ledger
    decoded = compeft.decode(compeft.encode(tensors, {"density": 0.15}))
    before, after = (
        {n: samples.values_of(t).astype(np.float64) for n, t in source.items()} for source in (tensors, decoded)
    )
    cosine = lambda one, two: (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)  # noqa: E731
    error = lambda one, two: np.linalg.norm(one - two) / np.linalg.norm(one)  # noqa: E731
    assert [loss.name for loss in sorted(ledger.tensors, key=lambda loss: loss.name)] == sorted(tensors)
    for loss in ledger.tensors:
        assert loss.kept == np.count_nonzero(after[loss.name])
        assert loss.size == before[loss.name].size
        assert loss.scale == pytest.approx(np.abs(after[loss.name]).max(), rel=1e-12)
        assert loss.cosine == pytest.approx(cosine(before[loss.name], after[loss.name]), rel=1e-6)
        assert loss.rel_error == pytest.approx(error(before[loss.name], after[loss.name]), rel=1e-6)
    flat = [np.concatenate([values[name].reshape(-1) for name in sorted(values)]) for values in (before, after)]
    assert ledger.all.cosine() == pytest.approx(cosine(*flat), rel=1e-6)
    assert ledger.all.rel_error() == pytest.approx(error(*flat), rel=1e-6)
    products = {"before": [], "after": []}
    assert [loss.module for loss in ledger.modules] == ["base_model.model.q", "base_model.model.v"]
    for loss in ledger.modules:
        a, b = f"{loss.module}.lora_A.weight", f"{loss.module}.lora_B.weight"
        one, two = before[b] @ before[a], after[b] @ after[a]
        products["before"].append(one)
        products["after"].append(two)
        assert loss.cosine == pytest.approx(cosine(one, two), rel=1e-6)
        assert loss.rel_error == pytest.approx(error(one, two), rel=1e-6)
        assert loss.sigma_ratio == pytest.approx(before[a].std() / before[b].std(), rel=1e-6)
    assert ledger.products.cosine() == pytest.approx(cosine(*map(np.array, products.values())), rel=1e-6)
    assert ledger.products.rel_error() == pytest.approx(error(*map(np.array, products.values())), rel=1e-6)
    # 0.05 and 0.01 made the factors, so the ratio is about 5.
    assert ledger.sigma_ratio() == pytest.approx(5, rel=0.1)
    assert ledger.warnings == []


def test_paper_warns_when_it_erases_b():
    def warnings(b, density):
        source = Arrays(samples.lora(np.random.default_rng(9), a=0.05, b=b))
        ternariser = Ternariser(
            source, chosen(source, "paper", {}), compeft.settings({"preset": "paper", "density": density})
        )
        for _ in ternariser:
            pass
        return ternariser.ledger.warnings, ternariser.ledger.share_of_b()

    erased, share = warnings(0.001, 0.2)
    assert share == 0
    assert len(erased) == 1
    assert "keeps 0.00% of the values of B (density 20%)" in erased[0]
    assert warnings(0.05, 0.2)[0] == []
    # Just above and below a quarter of the density.
    kept = {b: warnings(b, 0.2) for b in (0.021, 0.022, 0.023, 0.024, 0.025, 0.026, 0.027)}
    assert all(bool(found) == (share < 0.05) for found, share in kept.values())
    assert {bool(found) for found, _ in kept.values()} == {True, False}
