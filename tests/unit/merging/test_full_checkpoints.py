"""Merges of full checkpoints: the arithmetic, the files, and what is refused, on small models on disk."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import checkpoints as bench
from moerge import merging
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import arrays, full_checkpoints
from moerge.merging import recipe as recipes
from moerge.merging.sources import Cancelled
from moerge.tensors import files
from moerge.tensors.bases import BaseWeights

SHAPES = {"model.embed.weight": (40, 12), "model.layers.0.w.weight": (24, 12), "model.layers.1.w.weight": (12, 24),
          "model.norm.weight": (12,)}  # fmt: skip
NEEDS_BASE = [
    ("linear", {}), ("task_arithmetic", {"scale": 0.4}), ("ties", {"density": 0.3}),
    ("ties", {"variant": "release", "density": 0.3}), ("dare", {"rescale": "l1"}), ("della", {}), ("breadcrumbs", {}),
    ("magmax", {}), ("sce", {"select": 0.6}), ("consensus_ta", {}), ("magnitude_prune", {"scope": "global"}),
    ("pcb", {}), ("multislerp", {}), ("karcher", {}), ("layer_swapping", {"layers": "0=1; other=average"}),
    ("iso_c", {}), ("iso_cts", {}), ("tsv_m", {}),
]  # fmt: skip


def digest(number):
    return f"{number:064}"


def wanted(method, parameters=None, *, count=3, weights=None, dtype="float32", kind="full", seed=3, **more):
    weights = [1 / count] * count if weights is None else weights
    return recipes.parse(
        {
            "method": method,
            "parameters": parameters or {},
            "seed": seed,
            "experts": [
                {"expert": f"me/e{number}", "revision": "main", "digest": digest(number), "weight": weight}
                for number, weight in enumerate(weights)
            ],
            "output": {"kind": kind, "dtype": dtype},
            **more,
        }
    )


def save(folder, tensors, *, shards=1):
    """A checkpoint: a value is an array, or (array, dtype) for one of bfloat16 and float16."""
    folder.mkdir(exist_ok=True)
    stored = {}
    for name, given in tensors.items():
        values, dtype = given if isinstance(given, tuple) else (given, None)
        stored[name] = (
            files.BF16(files.to_bf16(values)) if dtype == "BF16" else values if dtype is None else values.astype(dtype)
        )
    if shards == 1:
        files.write(folder / "model.safetensors", stored, {"format": "pt"})
        return folder
    places = {
        name: f"model-0000{number % shards + 1}-of-0000{shards}.safetensors" for number, name in enumerate(stored)
    }
    for place in set(places.values()):
        files.write(
            folder / place, {name: one for name, one in stored.items() if places[name] == place}, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def values(seed, shape, size=1e-2):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, size=shape) * size * (rng.random(shape) > 0.1)).astype(np.float32)


def model(seed, shapes=SHAPES):
    return {name: values([seed, place], shape, 0.1) for place, (name, shape) in enumerate(shapes.items())}


def family(tmp_path, *, count=3, shapes=SHAPES, dtype=None, shards=1):
    """A base and experts on disk; values are rounded to `dtype` before they are handed back."""
    base = model(0, shapes)
    experts = [
        {name: one + values([seed + 1, place], one.shape) for place, (name, one) in enumerate(base.items())}
        for seed in range(count)
    ]
    if dtype == "BF16":
        base, *experts = ({n: files.from_bf16(files.to_bf16(v)) for n, v in each.items()} for each in [base, *experts])
    folders = [
        save(tmp_path / f"m{number}", {name: (one, dtype) for name, one in each.items()}, shards=shards)
        for number, each in enumerate([base, *experts])
    ]
    return base, experts, folders[0], {digest(number): folder for number, folder in enumerate(folders[1:])}


def merged(recipe, folders, out, base=None, **options):
    if base is None:
        full_checkpoints.merge(recipe, folders, out, **options)
    else:
        with BaseWeights(base) as weights:
            full_checkpoints.merge(recipe, folders, out, base=weights, **options)
    return loaded(out)


def loaded(folder):
    """What the reference reader finds, as float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    return found


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def nearest_bfloat16(exact):
    """The bfloat16 nearest to each float64, ties to even, found by trying the neighbours of the truncated value."""
    down = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
    tried = np.stack([down - 1, down, down + 1])
    near = (tried.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    distance = np.nan_to_num(np.abs(near - exact), nan=np.inf)
    best = np.where(distance == distance.min(axis=0), tried % 2, 2).argmin(axis=0)
    return np.take_along_axis(near, best[None], axis=0)[0].astype(np.float32)


def ties(deltas, density):
    """Equal weights, in float64, by sorting."""
    trimmed = []
    for delta in deltas:
        flat = delta.astype(np.float64).ravel()
        flat[np.argsort(-np.abs(flat), kind="stable")[max(1, int(density * flat.size + 1e-9)) :]] = 0
        trimmed.append(flat)
    stacked = np.stack(trimmed)
    agree = np.sign(stacked) == np.where(stacked.sum(axis=0) >= 0, 1, -1)
    return ((stacked * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)).reshape(deltas[0].shape)


def test_ties_of_bfloat16_checkpoints_is_float64_arithmetic_rounded_once(tmp_path):
    base, experts, base_folder, folders = family(tmp_path, count=4, dtype="BF16")
    found = merged(wanted("ties", {"density": 0.3}, count=4, dtype="bfloat16"), folders, tmp_path / "out", base_folder)
    assert found.keys() == SHAPES.keys()
    for name, one in base.items():
        exact = one.astype(np.float64) + ties([expert[name].astype(np.float64) - one for expert in experts], 0.3)
        assert np.abs(found[name] - one).max() > 0
        np.testing.assert_array_equal(found[name], nearest_bfloat16(exact))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_near_the_middle_of_two_bfloat16_goes_to_the_nearer_one(sign):
    even, odd, step = 1.0, 1 + 2.0**-7, 2.0**-8
    base = sign * np.array([even, even, odd, odd, even], np.float32)
    delta = sign * np.array([step + 2.0**-26, step, step - 2.0**-26, step, step - 2.0**-26], np.float32)
    found = files.from_bf16(full_checkpoints.rounded_sum(base, delta, "BF16"))
    np.testing.assert_array_equal(found, sign * np.array([odd, even, odd, 1 + 2.0**-6, even], np.float32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_sum_that_does_not_fit_its_dtype_is_told(dtype):
    largest = np.array([{"F32": 3.4e38, "F16": 65000.0, "BF16": 3.38e38}[dtype]], np.float32)
    assert full_checkpoints.rounded_sum(largest / 2, largest / 4, dtype) is not None
    assert full_checkpoints.rounded_sum(largest, largest, dtype) is None
    assert full_checkpoints.rounded_sum(None, np.array([np.nan], np.float32), dtype) is None
    full_nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    assert full_checkpoints.rounded_sum(None, full_nan, dtype) is None


def test_linear_needs_no_base_when_its_weights_sum_to_one(tmp_path):
    _, experts, _, folders = family(tmp_path)
    weights = [0.5, 0.75, -0.25]
    found = merged(wanted("linear", weights=weights), folders, tmp_path / "out")
    for name in SHAPES:
        exact = sum(weight * expert[name].astype(np.float64) for weight, expert in zip(weights, experts, strict=True))
        np.testing.assert_allclose(found[name], exact, rtol=1e-6, atol=1e-8)
    found = merged(wanted("linear", {"normalize": True}, weights=[2, 1, 1]), folders, tmp_path / "mean")
    exact = sum(w * e["model.norm.weight"].astype(np.float64) for w, e in zip([0.5, 0.25, 0.25], experts, strict=True))
    np.testing.assert_allclose(found["model.norm.weight"], exact, rtol=1e-6)


def test_slerp_without_a_base_turns_the_weights_themselves(tmp_path):
    _, experts, _, folders = family(tmp_path, count=2)
    found = merged(wanted("slerp", {"t": 0.25, "threshold": 1.0}, count=2), folders, tmp_path / "out")
    a, b = (expert["model.embed.weight"].astype(np.float64) for expert in experts)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    exact = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(found["model.embed.weight"], exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "parameters"), NEEDS_BASE)
def test_a_merge_of_checkpoints_is_the_base_plus_the_merge_of_all_deltas_at_once(tmp_path, method, parameters):
    base, experts, base_folder, folders = family(tmp_path)
    found = merged(wanted(method, parameters), folders, tmp_path / "out", base_folder)
    deltas = [{name: expert[name] - base[name] for name in SHAPES} for expert in experts]
    at_once = arrays.merge(method, deltas, weights=[1 / 3] * 3, parameters=parameters, seed=3, digests=list(folders))
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], base[name] + np.asarray(at_once[name], np.float32), err_msg=name)


@pytest.mark.parametrize(("method", "parameters"), [*NEEDS_BASE[:15], ("slerp", {"t": 0.3}), ("nuslerp", {})])
def test_threads_and_blocks_change_no_byte(tmp_path, method, parameters):
    # More than three of the smallest blocks.
    shapes = {"model.layers.0.w.weight": (700, 300), "model.norm.weight": (300,)}
    count = 2 if method in {"slerp", "nuslerp"} else 3
    _, _, base, folders = family(tmp_path, count=count, shapes=shapes, dtype="BF16")
    recipe = wanted(method, parameters, count=count, dtype="bfloat16")
    merged(recipe, folders, tmp_path / "one", base)
    merged(recipe, folders, tmp_path / "other", base, threads=3, block_values=1 << 16)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


def test_the_order_of_experts_changes_no_byte(tmp_path):
    _, _, base, folders = family(tmp_path)
    recipe = wanted("ties", {"density": 0.3}, weights=[0.2, 0.3, 0.5])
    body = recipe.to_dict()
    body["experts"].reverse()
    merged(recipe, folders, tmp_path / "one", base)
    merged(recipes.parse(body), folders, tmp_path / "other", base)
    assert everything(tmp_path / "one") == everything(tmp_path / "other")


def test_every_method_is_taken_or_refused_by_name():
    taken = {method for method, _ in NEEDS_BASE} | {"slerp", "nuslerp"}
    assert taken <= set(merging.catalogue())
    for name, spec in merging.catalogue().items():
        body = wanted("linear").to_dict() | {"method": name, "parameters": {}}
        body["experts"] = [{**expert, "statistics": "s" * 64} for expert in body["experts"][: spec.most_experts]]
        recipe = recipes.parse(body)
        if name in taken:
            full_checkpoints.check(recipe, has_base=True)
            continue
        with pytest.raises(RecipeInvalid, match=f"^{name} cannot merge full checkpoints") as error:
            full_checkpoints.check(recipe, has_base=True)
        assert error.value.pointer == "/method"


def test_dtypes_may_differ_between_checkpoints(tmp_path):
    base = {"w": np.array([1.0, 2.0, -3.0], np.float32)}
    folders = {
        digest(0): save(tmp_path / "a", {"w": (np.array([1.5, 2.0, -3.0], np.float32), "BF16")}),
        digest(1): save(tmp_path / "b", {"w": (np.array([1.0, 2.25, -4.0], np.float32), "float16")}),
    }
    found = merged(wanted("linear", count=2), folders, tmp_path / "out", save(tmp_path / "base", base))
    np.testing.assert_array_equal(found["w"], [1.25, 2.125, -3.5])


def test_without_a_dtype_every_tensor_keeps_that_of_the_base(tmp_path):
    tensors = {
        "a": (np.ones(4, np.float32), "BF16"),
        "b": np.ones(4, np.float32),
        "c": (np.ones(4, np.float32), "float16"),
    }
    folders = {digest(number): save(tmp_path / f"m{number}", tensors) for number in range(2)}
    merged(wanted("linear", count=2, dtype=None), folders, tmp_path / "out", save(tmp_path / "base", tensors))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert [file.get_slice(name).get_dtype() for name in "abc"] == ["BF16", "F32", "F16"]
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_shards_and_hold_the_same_values(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    _, _, base, folders = family(tmp_path / "x")
    _, _, sharded_base, sharded = family(tmp_path / "y", shards=2)
    recipe = wanted("dare")
    whole = merged(recipe, folders, tmp_path / "whole", base)
    found = merged(recipe, sharded, tmp_path / "out", sharded_base)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(one.size for one in whole.values())
    for name, place in index["weight_map"].items():
        with safe_open(tmp_path / "out" / place, framework="np") as file:
            np.testing.assert_array_equal(file.get_tensor(name), whole[name])
    assert found.keys() == whole.keys() == index["weight_map"].keys()


def test_a_head_that_is_tied_to_the_embeddings_is_merged_once(tmp_path):
    base, experts, _, _ = family(tmp_path)
    stored = []
    for number, each in enumerate([base, *experts]):
        each["lm_head.weight"] = each["model.embed.weight"]
        # One expert leaves the head out, as save_pretrained does.
        kept = {name: one for name, one in each.items() if number != 1 or name != "lm_head.weight"}
        stored.append(save(tmp_path / f"m{number}", kept))
    folders = {digest(number): folder for number, folder in enumerate(stored[1:])}
    with BaseWeights(stored[0]) as weights:
        report = full_checkpoints.merge(wanted("dare"), folders, tmp_path / "out", base=weights)
    found = loaded(tmp_path / "out")
    assert report.tied == {"model.embed.weight": "lm_head.weight"}
    assert np.count_nonzero(found["lm_head.weight"] - base["lm_head.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed.weight"])


def test_a_head_of_its_own_is_not_tied(tmp_path):
    base, experts, _, _ = family(tmp_path)
    folders = {}
    for number, each in enumerate([base, *experts]):
        each["lm_head.weight"] = each["model.embed.weight"] + np.float32(number == 3)
        folders[digest(number - 1)] = save(tmp_path / f"m{number}", each)
    found = merged(wanted("linear"), folders, tmp_path / "out", tmp_path / "m0")
    apart = found["lm_head.weight"] - found["model.embed.weight"]
    np.testing.assert_allclose(apart, 1 / 3, rtol=1e-5)


def test_an_expert_may_store_a_tied_head_that_the_base_leaves_out(tmp_path):
    _, experts, base, folders = family(tmp_path)
    save(folders[digest(0)], {**experts[0], "lm_head.weight": experts[0]["model.embed.weight"]})
    assert merged(wanted("linear"), folders, tmp_path / "out", base).keys() == SHAPES.keys()
    save(folders[digest(0)], {**experts[0], "lm_head.weight": experts[0]["model.embed.weight"] + 1})
    with pytest.raises(ExpertsIncompatible, match=r"me/e0 has a tensor lm_head\.weight, and the base has none"):
        merged(wanted("linear"), folders, tmp_path / "again", base)


def test_integers_are_copied_and_must_be_equal(tmp_path):
    base, experts, _, _ = family(tmp_path)
    ids = np.arange(6, dtype=np.int64)
    folders = {digest(i): save(tmp_path / f"i{i}", {**each, "ids": ids}) for i, each in enumerate(experts)}
    place = save(tmp_path / "base", {**base, "ids": ids})
    merged(wanted("ties"), folders, tmp_path / "out", place)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("ids"), ids)
        assert file.get_tensor("ids").dtype == np.int64
    save(folders[digest(2)], {**experts[2], "ids": ids[::-1].copy()})
    with pytest.raises(ExpertsIncompatible, match="ids differs between me/e2 and the base") as error:
        merged(wanted("ties"), folders, tmp_path / "again", place)
    assert error.value.pointer == "/experts/2"


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path):
    _, experts, base, folders = family(tmp_path)
    larger = np.concatenate([experts[1]["model.embed.weight"], np.zeros((1, 12), np.float32)])
    save(folders[digest(1)], {**experts[1], "model.embed.weight": larger})
    with pytest.raises(ExpertsIncompatible) as error:
        merged(wanted("linear"), folders, tmp_path / "out", base)
    for part in ("model.embed.weight", "[41, 12] in me/e1", "[40, 12] in the base, me/e0, me/e2"):
        assert part in error.value.detail
    assert (error.value.pointer, error.value.met, error.value.wanted) == ("/experts/1", [41, 12], [40, 12])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_value_that_is_not_finite_names_expert_and_tensor_and_leaves_nothing(tmp_path, method, value):
    _, experts, base, folders = family(tmp_path)
    broken = experts[1]["model.layers.1.w.weight"].copy()
    broken[3, 5] = value
    save(folders[digest(1)], {**experts[1], "model.layers.1.w.weight": broken})
    with pytest.raises(ExpertsIncompatible, match=r"me/e1 holds NaN or infinity in model\.layers\.1\.w\.weight"):
        merged(wanted(method), folders, tmp_path / "out", base)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_base_that_is_not_finite_is_named(tmp_path):
    base, _, place, folders = family(tmp_path)
    save(place, {**base, "model.norm.weight": np.full(12, np.nan, np.float32)})
    with pytest.raises(ExpertsIncompatible, match=r"the base holds NaN or infinity in model\.norm\.weight"):
        merged(wanted("ties"), folders, tmp_path / "out", place)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    _, experts, base, folders = family(tmp_path)
    save(folders[digest(2)], {name: one for name, one in experts[2].items() if name != "model.norm.weight"})
    with pytest.raises(ExpertsIncompatible, match=r"me/e2 has no tensor model\.norm\.weight"):
        merged(wanted("linear"), folders, tmp_path / "out", base)


@pytest.mark.parametrize(
    ("recipe", "pointer", "remedy"),
    [
        (wanted("ties"), "/base_model", "Hand in the base"),
        (wanted("linear", weights=[1, 1, 1]), "/experts", "normalize"),
        (wanted("linear", kind="lora"), "/output/kind", "full"),
        (wanted("cat"), "/method", "ties"),
    ],
)
def test_what_cannot_be_done_without_a_base_is_refused_before_a_file_is_opened(tmp_path, recipe, pointer, remedy):
    with pytest.raises(RecipeInvalid) as error:
        full_checkpoints.merge(recipe, {digest(number): tmp_path / "nothing" for number in range(3)}, tmp_path / "out")
    assert error.value.pointer == pointer
    assert remedy in error.value.remedy


def test_a_base_of_another_digest_is_refused(tmp_path):
    _, _, base, folders = family(tmp_path)
    with pytest.raises(ExpertsIncompatible) as error:
        merged(wanted("linear", base_weights="0" * 64), folders, tmp_path / "out", base)
    assert error.value.pointer == "/base_weights"
    with BaseWeights(base) as weights:
        right = wanted("linear", base_weights=weights.digest)
    assert merged(right, folders, tmp_path / "out", base)


def test_nothing_is_written_over_what_is_merged(tmp_path):
    _, _, base, folders = family(tmp_path)
    for place in (base, folders[digest(1)]):
        before = everything(place)
        with pytest.raises(RecipeInvalid, match="written over"):
            merged(wanted("linear"), folders, place, base)
        assert everything(place) == before


def test_a_sum_too_large_for_float16_is_refused(tmp_path):
    base = save(tmp_path / "base", {"w": np.zeros(8, np.float32)})
    folders = {digest(number): save(tmp_path / f"e{number}", {"w": np.full(8, 6e4, np.float32)}) for number in range(2)}
    with pytest.raises(ExpertsIncompatible) as error:
        merged(wanted("linear", weights=[1, 1], dtype="float16"), folders, tmp_path / "out", base)
    assert error.value.pointer == "/output/dtype"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("method", "parameters"), [("ties", {"density": 0.2}), ("sce", {}), ("multislerp", {})])
def test_memory_is_bounded_by_the_largest_tensor_and_told_before(tmp_path, method, parameters):
    def peak(layers, place):
        place.mkdir()
        shapes = {f"model.layers.{number}.w.weight": (256, 1024) for number in range(layers)}
        _, _, base, folders = family(place, count=2, shapes=shapes, dtype="BF16")
        recipe = wanted(method, parameters, count=2, dtype="bfloat16")
        merged(recipe, folders, place / "warm", base, block_values=1 << 16)
        with BaseWeights(base) as weights:
            tracemalloc.start()
            full_checkpoints.merge(recipe, folders, place / "out", base=weights, block_values=1 << 16)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert found < full_checkpoints.bytes_needed(recipe, [256 * 1024] * layers)
        return found

    few, many = peak(1, tmp_path / "few"), peak(8, tmp_path / "many")
    assert many < 1.1 * few
    # Two experts of eight such tensors are 16 MiB in float32.
    assert many < 8 << 20


def test_too_little_memory_is_refused_at_once(tmp_path):
    _, _, base, folders = family(tmp_path)
    with pytest.raises(RecipeInvalid, match="may use 1 MiB"):
        merged(wanted("tsv_m"), folders, tmp_path / "out", base, memory_bytes=1 << 20)
    assert not (tmp_path / "out").exists()


def test_progress_rises_to_one_and_whoever_cancels_leaves_nothing(tmp_path):
    _, _, base, folders = family(tmp_path)
    heard = []
    merged(wanted("ties"), folders, tmp_path / "out", base, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert len(heard) > len(SHAPES)
    with pytest.raises(Cancelled):
        merged(wanted("ties"), folders, tmp_path / "stopped", base, cancelled=lambda: True)
    assert list((tmp_path / "stopped").iterdir()) == []


def test_config_and_tokenizer_come_with_it(tmp_path):
    _, _, base, folders = family(tmp_path)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    (base / "tokenizer.json").write_text("{}")
    (base / "model.py").write_text("raise SystemExit")
    merged(wanted("linear", dtype="bfloat16"), folders, tmp_path / "out", base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_transformers_loads_a_merged_model_with_tied_embeddings(tmp_path):
    import torch
    import transformers

    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                      num_key_value_heads=2, vocab_size=30, tie_word_embeddings=True)  # fmt: skip
    weights = []
    for number in range(3):
        torch.manual_seed(number)
        network = transformers.LlamaForCausalLM(config)
        network.save_pretrained(tmp_path / f"m{number}")
        weights.append({name: one.double() for name, one in network.state_dict().items()})
    folders = {digest(number): tmp_path / f"m{number + 1}" for number in range(2)}
    merged(wanted("task_arithmetic", {"scale": 0.5}, weights=[1, -0.5]), folders, tmp_path / "out", tmp_path / "m0")
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, one in again.state_dict().items():
        exact = (
            weights[0][name]
            + 0.5 * (weights[1][name] - weights[0][name])
            - 0.25 * (weights[2][name] - weights[0][name])
        )
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-7)


def test_the_benchmark_compares_both_with_arithmetic_of_its_own(tmp_path):
    shape = (64, 16, 24, 1, 4)
    bench.build(tmp_path / "models", shape)
    bench.write_recipe(tmp_path / "models", "ties", 4)
    bench.merge_ours(str(tmp_path / "models"), "ties")
    wanted_values = bench.ties_in_float64(tmp_path / "models", 4)
    assert bench.differences(tmp_path / "models" / "ours-ties", wanted_values) == (0.0, 0.0)
    distance, share = bench.differences(tmp_path / "models" / "base", wanted_values)
    assert distance == 1.0
    assert 0 < share < 1
    assert bench.parameters(bench.TARGET_SHAPE) == 54_910_464


def test_targets_of_the_benchmark_hold_at_their_size_alone():
    ours, peer = bench.Taken(1.0, 2.0, 100), bench.Taken(3.0, 9.0, 500)
    rows = bench.rows_of("ties", ours, peer, bench.TARGET_SHAPE)
    assert [(row["value"], row["target"], row["met"]) for row in rows[3:]] == [(4.5, 5.0, False), (5.0, 4.0, True)]
    assert [row["peer_value"] for row in rows[:3]] == [3.0, 9.0, 500]
    assert all(row["met"] is None for row in bench.rows_of("ties", ours, peer, bench.SMALL_SHAPE))
    assert len(bench.rows_of("linear", ours, None, bench.TARGET_SHAPE)) == 3
