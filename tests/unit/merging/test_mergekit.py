"""mergekit's recipes: that ours give its formulas, worked here in float64, and that nothing is dropped in silence."""

import numpy as np
import pytest
import yaml

from moerge.errors import RecipeInvalid
from moerge.merging import arrays, documents, mergekit, recipe
from moerge.merging.mergekit.methods import METHODS

BASE = "org/base"
WEIGHTS = (0.5, 0.3, -0.4)


def given(method, models=None, **fields):
    if models is None:
        models = [{"model": f"{BASE}+me/e{n}", "parameters": {"weight": w}} for n, w in enumerate(WEIGHTS)]
    return {"merge_method": method, "base_model": BASE, "models": models, **fields}


def without_weights(count=3, *, form=f"{BASE}+me/e{{}}"):
    return [{"model": form.format(n)} for n in range(count)]


def deltas(count=3, shape=(6, 5)):
    rng = np.random.default_rng(5)
    return [(rng.standard_t(3, size=shape) * (rng.random(shape) > 0.1)).astype(np.float32) for _ in range(count)]


def ours(document, experts):
    """The merge that the translated recipe gives, (6, 5)."""
    body = mergekit.translate(document)
    parsed = recipe.parse(
        body | {"experts": [{"revision": "main", "digest": f"{n}", **one} for n, one in enumerate(body["experts"])]}
    )
    weights = [expert.weight for expert in parsed.experts]
    found = arrays.merge(
        parsed.method,
        [{"w": experts[int(expert.digest)]} for expert in parsed.experts],
        weights=weights,
        parameters=dict(parsed.parameters),
        digests=[expert.digest for expert in parsed.experts],
    )
    return np.asarray(found["w"], np.float64)


def top(values, share):
    flat = values.astype(np.float64).ravel()
    flat[np.argsort(-np.abs(flat), kind="stable")[max(1, int(share * flat.size)) :]] = 0
    return flat.reshape(values.shape)


def elected(stacked, weights, *, normalize):
    """mergekit's sign consensus of weighted deltas."""
    weighted = stacked * np.reshape(weights, (-1, 1, 1))
    mask = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, 1, -1)
    mixed, divisor = (weighted * mask).sum(axis=0), (np.reshape(weights, (-1, 1, 1)) * mask).sum(axis=0)
    return mixed / np.where(divisor == 0, 1, divisor) if normalize else mixed


@pytest.mark.parametrize("normalize", [None, True, False])
def test_ties_trims_elects_by_weight_and_divides_by_the_weights_that_agree(normalize):
    parameters = {"density": 0.4, "lambda": 0.7} | ({} if normalize is None else {"normalize": normalize})
    experts = deltas()
    exact = 0.7 * elected(np.stack([top(one, 0.4) for one in experts]), WEIGHTS, normalize=normalize is not False)
    np.testing.assert_allclose(ours(given("ties", parameters=parameters), experts), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("normalize", "divisor"), [(None, 1.0), (False, 1.0), (True, 0.4)])
def test_task_arithmetic_adds_up(normalize, divisor):
    parameters = {"lambda": 2} | ({} if normalize is None else {"normalize": normalize})
    experts = deltas()
    exact = 2 * sum(w * one.astype(np.float64) for w, one in zip(WEIGHTS, experts, strict=True)) / divisor
    np.testing.assert_allclose(
        ours(given("task_arithmetic", parameters=parameters), experts), exact, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("rescale", "kept"), [(None, 1.0), (True, 1.0), (False, None)])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_one_expert_that_loses_values_at_random_keeps_its_sum_of_magnitudes_where_rescaled(method, rescale, kept):
    each = {"weight": 1, "density": 0.5} | ({"epsilon": 0.1} if "della" in method else {})
    document = given(method, [{"model": f"{BASE}+me/e0", "parameters": each}])
    if rescale is not None:
        document["parameters"] = {"rescale": rescale}
    (expert,) = deltas(1, (60, 50))
    found = ours(document, [expert])
    is_kept = found != 0
    assert 0.4 < is_kept.mean() / np.mean(expert != 0) < 0.6
    ratio = found[is_kept] / expert[is_kept]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    if kept is None:
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)
    else:
        assert np.abs(found).sum() == pytest.approx(np.abs(expert.astype(np.float64)).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "elects", "normalize"),
    [("dare_linear", False, False), ("dare_ties", True, False), ("della", True, True), ("della_linear", False, False)],
)
def test_without_a_density_nothing_is_dropped(method, elects, normalize):
    experts = deltas()
    stacked = np.stack(experts).astype(np.float64)
    exact = elected(stacked, WEIGHTS, normalize=normalize) if elects else np.tensordot(WEIGHTS, stacked, 1)
    np.testing.assert_allclose(ours(given(method), experts), exact, rtol=1e-5, atol=1e-6)


def test_breadcrumbs_drops_the_largest_and_keeps_the_next():
    experts = deltas()
    banded = []
    for one in experts:
        flat = one.astype(np.float64).ravel()
        order = np.argsort(-np.abs(flat), kind="stable")
        flat[order[:3]] = 0
        flat[order[3 + 15 :]] = 0
        banded.append(flat.reshape(one.shape))
    exact = sum(w * one for w, one in zip(WEIGHTS, banded, strict=True))
    found = ours(given("breadcrumbs", parameters={"density": 0.5, "gamma": 0.1}), experts)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)


def test_sce_selects_by_variance_weighs_by_energy_and_erases_minorities():
    experts = deltas()
    stacked = np.stack(experts).astype(np.float64)
    variance = stacked.var(axis=0)
    kept = np.argsort(-variance.ravel())[: int(0.5 * np.count_nonzero(variance))]
    mask = np.isin(np.arange(30), kept).reshape(6, 5)
    stacked = stacked * mask
    energy = np.square(stacked).mean(axis=(1, 2))
    shares = (energy / energy.sum())[:, None, None] * (np.sign(stacked) == np.where(stacked.sum(axis=0) >= 0, 1, -1))
    divisor = shares.sum(axis=0)
    exact = (stacked * shares).sum(axis=0) / np.where(divisor == 0, 1, divisor)
    document = given("sce", without_weights(), parameters={"select_topk": 0.5, "int8_mask": True})
    np.testing.assert_allclose(ours(document, experts), exact, rtol=1e-4, atol=1e-7)


def between(a, b, t):
    angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True) / np.linalg.norm(a, axis=-1, keepdims=True)
                              / np.linalg.norm(b, axis=-1, keepdims=True), -1, 1))  # fmt: skip
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("listed", ["both", "other", "reversed"])
def test_slerp_goes_from_the_base_model_to_the_other(listed):
    a, b = (one.astype(np.float64) for one in deltas(2))
    models = {"both": ["me/a", "me/b"], "other": ["me/b"], "reversed": ["me/b", "me/a"]}[listed]
    document = {"merge_method": "slerp", "base_model": "me/a", "models": [{"model": one} for one in models],
                "parameters": {"t": 0.2}}  # fmt: skip
    body = mergekit.translate(document)
    assert [expert["expert"] for expert in body["experts"]] == ["me/a", "me/b"]
    assert "base_model" not in body
    np.testing.assert_allclose(
        ours(document, deltas(2)), between(a.ravel(), b.ravel(), 0.2).reshape(6, 5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("parameters", "turned"),
    [
        ({}, lambda a, b, t: between(a.ravel(), b.ravel(), t).reshape(6, 5)),
        ({"nuslerp_flatten": False}, between),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, lambda a, b, t: between(a.T, b.T, t).T),
    ],
)
def test_nuslerp_turns_tensors_rows_or_columns(parameters, turned):
    experts = deltas(2)
    models = [{"model": f"{BASE}+me/e{n}", "parameters": {"weight": w}} for n, w in enumerate((3, 1))]
    exact = turned(*(one.astype(np.float64) for one in experts), 0.25)
    np.testing.assert_allclose(
        ours(given("nuslerp", models, parameters=parameters), experts), exact, rtol=1e-5, atol=1e-6
    )


def test_multislerp_is_the_mean_direction_at_the_mean_length():
    experts = deltas()
    models = [{"model": f"{BASE}+me/e{n}", "parameters": {"weight": w}} for n, w in enumerate((1, 2, 5))]
    sizes = [np.linalg.norm(one.astype(np.float64)) for one in experts]
    direction = sum(
        w / 8 * one.astype(np.float64) / size for w, one, size in zip((1, 2, 5), experts, sizes, strict=True)
    )
    exact = direction / np.linalg.norm(direction) * np.dot((1, 2, 5), sizes) / 8
    np.testing.assert_allclose(ours(given("multislerp", models), experts), exact, rtol=1e-5, atol=1e-6)


def test_karcher_takes_models_alone_with_equal_weights():
    document = {
        "merge_method": "karcher",
        "models": [{"model": f"me/e{n}"} for n in range(3)],
        "parameters": {"max_iter": 30},
    }
    body = mergekit.translate(document)
    assert body["parameters"] == {"steps": 30, "tolerance": 1e-5}
    assert {expert["weight"] for expert in body["experts"]} == {1.0}
    experts = [one.astype(np.float64) for one in deltas()]
    found = ours(document, deltas())
    mean = found / np.linalg.norm(found)
    assert np.linalg.norm(found) == pytest.approx(np.mean([np.linalg.norm(one) for one in experts]), rel=1e-5)
    pull = np.zeros_like(mean)
    for unit in (one / np.linalg.norm(one) for one in experts):
        angle = np.arccos((unit * mean).sum())
        pull += angle / np.sin(angle) * (unit - np.cos(angle) * mean)
    assert np.linalg.norm(pull) < 1e-4


def test_linear_averages_and_the_base_takes_its_share():
    experts = deltas()
    weights = (1, 2, 1)
    models = [{"model": f"{BASE}+me/e{n}", "parameters": {"weight": w}} for n, w in enumerate(weights)]
    summed = sum(w * one.astype(np.float64) for w, one in zip(weights, experts, strict=True))
    np.testing.assert_allclose(ours(given("linear", models), experts), summed / 4, rtol=1e-5, atol=1e-6)
    with_base = [*models, {"model": BASE, "parameters": {"weight": 4}}]
    np.testing.assert_allclose(ours(given("linear", with_base), experts), summed / 8, rtol=1e-5, atol=1e-6)
    assert mergekit.translate(given("linear", models))["base_model"] == BASE


def test_a_whole_document_is_read():
    text = """
merge_method: dare_ties      # comments are allowed
base_model: org/base
slices:
  - sources:
      - {model: org/base, layer_range: [0, 32]}
      - model: org/base+me/a@v1
        layer_range: [0, 32]
        parameters: {weight: 0.6}
      - model: {model: {path: org/base}, lora: {path: me/b, revision: v2}}
        layer_range: [0, 32]
        parameters: {weight: [0.4, 0.4]}
    parameters:
      density: {value: 0.53}
parameters:
  int8_mask: true
  normalize: 1
dtype: float32
out_dtype: bfloat16
tokenizer_source: null
"""
    assert documents.read(text) == {
        "base_model": "org/base",
        "method": "dare",
        "parameters": {"elect": "ties", "rescale": "l1", "normalize": True, "scale": 1.0, "density": 0.53},
        "experts": [
            {"expert": "me/a", "revision": "v1", "weight": 0.6},
            {"expert": "me/b", "revision": "v2", "weight": 0.4},
        ],
        "output": {"dtype": "bfloat16"},
    }


def test_a_parameter_of_a_model_counts_before_one_of_all():
    models = [
        {"model": f"{BASE}+me/a", "parameters": {"weight": 2}},
        {"model": f"{BASE}+me/b"},
    ]
    body = mergekit.translate(given("task_arithmetic", models, parameters={"weight": 0.5}))
    assert [expert["weight"] for expert in body["experts"]] == [2.0, 0.5]


def test_every_method_of_mergekit_can_be_parsed_here():
    for name in METHODS:
        models = [{"model": f"me/e{n}"} for n in range(2)]
        parameters = {"t": 0.5} if name == "slerp" else {"weight": 0.5} if METHODS[name].has_weights else {}
        document = {"merge_method": name, "models": models, "parameters": parameters}
        if name == "slerp":
            document["base_model"] = "me/e0"
        elif METHODS[name].base == "needed":
            document["base_model"] = BASE
        body = documents.read(yaml.safe_dump(document))
        for number, expert in enumerate(body["experts"]):
            expert |= {"revision": "main", "digest": str(number)}
        assert len(recipe.parse(body).experts) == 2


one = {"model": f"{BASE}+me/a", "parameters": {"weight": 1}}
two = {"model": f"{BASE}+me/b", "parameters": {"weight": 1}}
plain = [{"model": "me/a", "parameters": {"weight": 1}}, {"model": "me/b", "parameters": {"weight": 1}}]


@pytest.mark.parametrize(
    ("document", "pointer", "part"),
    [
        ({"merge_method": "model_stock"}, "/merge_method", "model_stock"),
        ({"merge_method": "passthrough"}, "/merge_method", "stacked"),
        (given("breadcrumbs_ties"), "/merge_method", "breadcrumbs_ties"),
        (given("ties_"), "/merge_method", "ties_"),
        (given(None), "/merge_method", "nothing"),
        (given("ties", modules={}), "/modules", "modules"),
        (given("ties", tokenizer_source="union"), "/tokenizer_source", "tokenizer"),
        (given("ties", tokenizer={"source": "base"}), "/tokenizer", "tokenizer"),
        (given("ties", chat_template="auto"), "/chat_template", "tokenizer"),
        (given("ties", models_=[]), "/models_", "models_"),
        (given("ties", dtype="float64"), "/dtype", "float64"),
        (given("ties", [one, two], slices=[]), "/slices", "slices"),
        (given("ties", []), "/models", "/models"),
        (given("ties", [{"parameters": {}}]), "/models/0/model", "nothing"),
        (given("ties", [{"model": "a+b+c"}]), "/models/0/model", "a+b+c"),
        (given("ties", [{"model": "me/a@x@y"}]), "/models/0/model", "x@y"),
        (given("ties", [{"model": f"{BASE}@v1+me/a"}]), "/models/0/model", "v1"),
        (given("ties", [one, {"model": "org/other+me/b", "parameters": {"weight": 1}}]), "/models/1/model", "org/other"),
        (given("ties", [one, plain[1]]), "/models/1/model", "me/b"),
        (given("ties", [one, {**two, "layer_range": [0, 4]}]), "/models/1/layer_range", "layer_range"),
        (given("ties", [{"model": BASE}]), "/models", "0 models"),
        (given("ties", [one, {"model": f"{BASE}+me/b"}]), "/models/1/parameters/weight", "weight"),
        (given("ties", [one, {**two, "parameters": {"weight": 1, "density": 0.5}}]), "/models/1/parameters/density", "0.5"),
        (given("ties", [one, {**two, "parameters": {"weight": [0, 1]}}]), "/models/1/parameters/weight", "layer to layer"),
        (given("ties", parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]}),
         "/parameters/density/0/filter", "some tensors"),
        (given("ties", parameters={"rescale": True}), "/parameters/rescale", "rescale"),
        (given("ties", parameters={"gamma": 0.1}), "/parameters/gamma", "gamma"),
        (given("ties", parameters={"lambda": "much"}), "/parameters/lambda", "much"),
        (given("ties", parameters={"normalize": 2}), "/parameters/normalize", "2"),
        (given("ties", parameters=[1]), "/parameters", "/parameters"),
        (given("task_arithmetic", parameters={"density": 0.5}), "/parameters/density", "density"),
        (given("ties", [{**one, "parameters": {"weight": 1, "normalize": True}}]), "/models/0/parameters/normalize", "model"),
        (given("sce"), "/models/0/parameters/weight", "weight"),
        (given("linear", [one, two], parameters={"normalize": False}), "/parameters/normalize", "sum to 2"),
        ({"merge_method": "ties", "models": [one, two]}, "/base_model", "base_model"),
        ({"merge_method": "ties", "models": plain}, "/base_model", "base_model"),
        ({"merge_method": "slerp", "models": without_weights(2, form="me/e{}"), "parameters": {"t": 0.5}}, "/base_model", "t = 0"),
        (given("slerp", without_weights(2), parameters={"t": 0.5}), "/merge_method", "deltas"),
        (given("karcher", without_weights()), "/merge_method", "deltas"),
        ({"merge_method": "nuslerp", "models": [one, two]}, "/merge_method", "base_model"),
        (given("nuslerp"), "/models", "3 models"),
        ({"merge_method": "slerp", "base_model": "me/a", "models": [{"model": "me/b"}]}, "/parameters/t", "needs t"),
        (given("multislerp", [one, two], parameters={"eps": 0.1}), "/parameters/eps", "eps"),
        (given("ties", None, base_model=f"{BASE}+me/z"), "/base_model", "another model"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_here_is_refused_by_name(document, pointer, part):
    with pytest.raises(RecipeInvalid) as error:
        mergekit.translate(
            {key: value for key, value in document.items() if value is not None or key == "merge_method"}
        )
    assert error.value.pointer == pointer
    assert part in error.value.detail + error.value.remedy
    assert error.value.wanted
    assert error.value.remedy


@pytest.mark.parametrize(
    ("ranges", "at"),
    [([[0, 8], [8, 16]], 1), ([[4, 8], [4, 8]], 0), ([[0, 8], None], 1), ([[0, 8], [0, 9]], 1), ([[0], [0]], 0)],
)
def test_layers_that_are_not_all_layers_are_refused(ranges, at):
    sources = [{**model, "layer_range": one_range} for model, one_range in zip((one, two), ranges, strict=True)]
    document = {"merge_method": "ties", "base_model": BASE, "slices": [{"sources": sources}]}
    with pytest.raises(RecipeInvalid) as error:
        mergekit.translate(document)
    assert error.value.pointer == f"/slices/0/sources/{at}/layer_range"


def test_several_slices_are_refused():
    slices = [{"sources": [{**one, "layer_range": [start, start + 8]}]} for start in (0, 8)]
    with pytest.raises(RecipeInvalid, match="several slices") as error:
        mergekit.translate({"merge_method": "ties", "base_model": BASE, "slices": slices})
    assert error.value.pointer == "/slices"
