"""What merges are written as: dense task vectors, the base with the merge added, IA3, saved tensors and biases."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge import merging
from moerge.errors import AdapterInvalid, ExpertsIncompatible, RecipeInvalid
from moerge.merging import cost, recipe, run
from moerge.merging.report import MOST_MODULES_TOLD
from moerge.tensors import header
from tests.unit.merging import disk
from tests.unit.merging.disk import Q, V, deltas, expected, merge, write, write_base, write_ia3

HEAD, NORM = "lm_head.weight", "model.norm.weight"
KINDS = ("lora", "delta", "full", "ternary")


@pytest.fixture
def pair(tmp_path):
    """Different ranks and scalings, and a module that one of them lacks."""
    first = write(tmp_path / "first", {Q: (24, 16, 3), V: (12, 16, 3)}, alpha=6)
    second = write(tmp_path / "second", {Q: (24, 16, 5)}, alpha=3, use_rslora=True)
    return first, second


def tensors_of_base(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {f"{Q}.weight": (24, 16), f"{V}.weight": (12, 16), NORM: (16,), HEAD: (7, 16)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path):
    with write_base(tmp_path / "base", tensors_of_base()) as opened:
        yield opened


def summed(pair):
    """0.7 and 0.3 of the pair's deltas, by module."""
    return {
        Q: 0.7 * expected(pair[0], 2) + 0.3 * expected(pair[1], 3 / 5**0.5),
        V: 0.7 * expected(pair[0], 2, V),
    }


def refused(error, *args, **options):
    with pytest.raises(error) as caught:
        merge(*args, **options)
    assert caught.value.wanted
    assert caught.value.remedy
    return caught.value


# Dense task vectors


def test_a_delta_holds_the_sum_under_the_names_of_the_base(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "delta"})
    found = load_file(tmp_path / "out" / "delta.safetensors")
    assert sorted(found) == [f"{Q}.weight", f"{V}.weight"]
    for module, wanted in summed(pair).items():
        np.testing.assert_allclose(found[f"{module}.weight"], wanted, atol=1e-5)
    assert (report.rank, report.energy_kept, report.kind) == (None, 1.0, "delta")
    norms = {module.name: module.norm for module in report.modules}
    assert norms == pytest.approx({name: np.linalg.norm(delta) for name, delta in summed(pair).items()}, rel=1e-5)
    record = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert (record["base_model"], record["file"], record["tensors"]) == ("acme/base", "delta.safetensors", 2)
    assert record["recipe_digest"] == disk.parse(pair, [0.7, 0.3], output={"kind": "delta"}).digest


def test_the_names_are_those_that_the_base_has_for_its_tensors(tmp_path, pair):
    inner = {name.removeprefix("model."): values for name, values in tensors_of_base().items()}
    with write_base(tmp_path / "base", inner) as opened:
        merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "delta"}, base=opened)
    assert sorted(load_file(tmp_path / "out" / "delta.safetensors")) == [
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.v_proj.weight",
    ]


def test_a_delta_lies_as_the_base_stores_its_weight(tmp_path):
    """An embedding by tokens, a convolution as a kernel, GPT-2's layers by inputs."""
    rng = np.random.default_rng(1)
    parts = {
        "embed.lora_embedding_A": rng.normal(size=(2, 30)), "embed.lora_embedding_B": rng.normal(size=(8, 2)),
        "conv.lora_A.weight": rng.normal(size=(2, 4, 3, 3)), "conv.lora_B.weight": rng.normal(size=(6, 2, 1, 1)),
    }  # fmt: skip
    expert = write(tmp_path / "a", {"fc": (5, 9, 2)}, alpha=2, tensors=parts, target_modules=["embed", "conv", "fc"])
    merge(tmp_path / "out", [expert], [1.0], output={"kind": "delta"})
    found = load_file(tmp_path / "out" / "delta.safetensors")
    A, B = (parts[f"embed.lora_embedding_{role}"] for role in "AB")
    np.testing.assert_allclose(found["embed.weight"], (B @ A).T, atol=1e-5)
    kernel = np.einsum("or,rikl->oikl", parts["conv.lora_B.weight"][:, :, 0, 0], parts["conv.lora_A.weight"])
    np.testing.assert_allclose(found["conv.weight"], kernel, atol=1e-5)
    np.testing.assert_allclose(found["fc.weight"], expected(expert, 1, "fc"), atol=1e-5)

    turned = write(tmp_path / "b", {"fc": (5, 9, 2), "square": (6, 6, 2)}, alpha=2, fan_in_fan_out=True)
    merge(tmp_path / "turned", [turned], [1.0], output={"kind": "delta"})
    found = load_file(tmp_path / "turned" / "delta.safetensors")
    for name in ("fc", "square"):
        np.testing.assert_allclose(found[f"{name}.weight"], expected(turned, 1, name).T, atol=1e-5)


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_delta_is_rounded_once_to_the_dtype_asked_for(tmp_path, pair, dtype, step):
    merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "delta", "dtype": dtype})
    data = (tmp_path / "out" / "delta.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[f"{Q}.weight"]
    stored = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
    if dtype == "bfloat16":
        found = (np.frombuffer(stored, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        found = np.frombuffer(stored, "<f2").astype(np.float32)
    wanted = summed(pair)[Q]
    error = np.abs(found.reshape(24, 16) - wanted)
    assert (error <= step * np.abs(wanted) * (1 + 1e-3) + 1e-6).all()
    assert error.max() > 0


def test_ties_as_a_delta_is_ties_worked_out_on_the_dense_deltas(tmp_path, pair):
    """Density 0.5, the rule of PEFT, on the module that both have."""
    merge(tmp_path / "out", pair, [0.7, 0.3], "ties", parameters={"variant": "peft", "density": 0.5},
          output={"kind": "delta"})  # fmt: skip
    both = np.stack([expected(pair[0], 2), expected(pair[1], 3 / 5**0.5)])
    cut = np.array([np.sort(np.abs(delta).ravel())[-24 * 16 // 2] for delta in both])
    trimmed = both * (np.abs(both) >= cut[:, None, None])
    agree = (np.sign(trimmed) == np.where(trimmed.sum(axis=0) >= 0, 1, -1)) & (trimmed != 0)
    wanted = (np.array([0.7, 0.3])[:, None, None] * trimmed * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    np.testing.assert_allclose(load_file(tmp_path / "out" / "delta.safetensors")[f"{Q}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["delta", "full"])
def test_memory_does_not_grow_with_the_number_of_modules(tmp_path, kind):
    """Eight dense modules are 20 MB."""
    modules = {f"layers.{i}.q": (700, 900, 2) for i in range(8)}
    expert = write(tmp_path / "a", modules)
    tensors = {f"{name}.weight": np.zeros((700, 900), np.float32) for name in modules}
    with write_base(tmp_path / "base", tensors) as opened:
        weights = opened if kind == "full" else None
        merge(tmp_path / "warm", [expert], [1.0], output={"kind": kind}, base=weights)
        tracemalloc.start()
        merge(tmp_path / "out", [expert], [1.0], output={"kind": kind}, base=weights, memory_bytes=1 << 30)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_takes_no_more_memory_than_was_said_before(tmp_path, kind, method):
    """Three experts, four modules and a head that each of them replaces."""
    modules = {f"layers.{i}": (500, 600, 4) for i in range(4)}
    rng = np.random.default_rng(1)
    heads = [{HEAD: rng.normal(size=(800, 600))} for _ in range(3)]
    experts = [write(tmp_path / name, modules, tensors=own, modules_to_save=["lm_head"])
               for name, own in zip("abc", heads, strict=True)]  # fmt: skip
    tensors = {f"{name}.weight": np.zeros((500, 600), np.float32) for name in modules}
    with write_base(tmp_path / "base", tensors | {HEAD: np.zeros((800, 600), np.float32)}) as opened:
        merge(tmp_path / "warm", experts, [1, 1, 1], method, output={"kind": kind}, base=opened)
        tracemalloc.start()
        merge(tmp_path / "out", experts, [1, 1, 1], method, output={"kind": kind}, base=opened)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        parsed = disk.parse(experts, [1, 1, 1], method, output={"kind": kind}, base=opened)
    told = cost.estimate(
        parsed.spec, parsed.output, [dict.fromkeys(modules, (500, 600, 4))] * 3,
        saved=[{HEAD: (800, 600)}] * 3, base_bytes=opened.checkpoint.file_bytes,
    )  # fmt: skip
    assert peak < told.memory_bytes - cost.FIXED_BYTES < 8 * peak
    if kind != "ternary":
        written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert written <= told.written_bytes < 1.2 * written


# The base with the merge added


def test_full_weights_are_the_base_with_the_sum_added_and_the_rest_as_it_was(tmp_path, pair, base):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "full"}, base=base)
    own, found = tensors_of_base(), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == own.keys()
    for module, delta in summed(pair).items():
        np.testing.assert_allclose(found[f"{module}.weight"], own[f"{module}.weight"] + delta, atol=1e-5)
    for name in (NORM, HEAD):
        assert found[name].tobytes() == own[name].tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert (report.rank, report.energy_kept) == (None, 1.0)


def test_full_weights_are_cut_into_files_as_the_base_is(tmp_path, pair):
    tensors = tensors_of_base(dtype=np.float16) | {"model.ids": np.arange(5)}
    shards = {"model-00001-of-00002.safetensors": [f"{Q}.weight", "model.ids"],
              "model-00002-of-00002.safetensors": [f"{V}.weight", NORM, HEAD]}  # fmt: skip
    with write_base(tmp_path / "base", tensors, shards=shards) as opened:
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        (tmp_path / "base" / "modeling.py").write_text("raise SystemExit")
        merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "full"}, base=opened)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", *shards, "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in shards.items() for name in names}
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
    for file, names in shards.items():
        found = load_file(tmp_path / "out" / file)
        assert {name: values.dtype for name, values in found.items()} == {name: tensors[name].dtype for name in names}
        for name in set(names) & {NORM, HEAD, "model.ids"}:
            assert found[name].tobytes() == tensors[name].tobytes()
    # Added in float32 and rounded once: what rounding the exact sum gives, but for sums next to a tie.
    exact = tensors[f"{Q}.weight"].astype(np.float64) + summed(pair)[Q]
    found = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")[f"{Q}.weight"]
    assert (found == exact.astype(np.float16)).mean() > 0.99


def test_full_weights_take_the_dtype_asked_for_and_the_config_says_so(tmp_path, pair):
    with write_base(tmp_path / "base", tensors_of_base() | {"ids": np.arange(3)}, torch_dtype="float32") as opened:
        merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "full", "dtype": "bfloat16"}, base=opened)
    found = header.read(tmp_path / "out" / "model.safetensors", header.Limits(dtypes=frozenset({"BF16", "I64"})))
    assert {name: info.dtype for name, info in found.tensors.items() if name != "ids"} == dict.fromkeys(
        tensors_of_base(), "BF16"
    )
    assert found.tensors["ids"].dtype == "I64"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_full_weights_without_the_base_or_with_another_are_refused(tmp_path, pair, base):
    found = refused(ExpertsIncompatible, tmp_path / "out", pair, [0.7, 0.3], output={"kind": "full"})
    assert (found.pointer, "add_base_weights" in found.remedy) == ("/output/kind", True)
    parsed = disk.parse(pair, [0.7, 0.3], output={"kind": "full"}, base=base)
    with write_base(tmp_path / "other", tensors_of_base(seed=1)) as other, pytest.raises(ExpertsIncompatible) as caught:
        run.merge(parsed, {adapter.digest: adapter for adapter in pair}, tmp_path / "out", base=other)
    assert (caught.value.pointer, caught.value.met, caught.value.wanted) == ("/base_weights", other.digest, base.digest)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{V}.weight": None}, f"acme/first changes {V}.weight"),
        ({f"{Q}.weight": np.zeros((24, 17), np.float32)}, "and [24, 17] in the base"),
        ({f"{Q}.weight": np.zeros((24, 16), np.int8)}, "is I8"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_tensor_and_expert(tmp_path, pair, change, says):
    tensors = {name: values for name, values in (tensors_of_base() | change).items() if values is not None}
    with write_base(tmp_path / "base", tensors) as opened:
        found = refused(ExpertsIncompatible, tmp_path / "out", pair, [1, 1], output={"kind": "full"}, base=opened)
    assert says in found.detail
    assert "acme/" in found.detail or "is I8" in says
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_is_the_head_too_is_not_changed_as_both(tmp_path):
    """PEFT's delta of an embedding acts where tokens come in, not where they go out."""
    parts = {"embed_tokens.lora_embedding_A": np.ones((2, 30)), "embed_tokens.lora_embedding_B": np.ones((8, 2))}
    expert = write(tmp_path / "a", {"fc": (5, 8, 2)}, tensors=parts, target_modules=["embed_tokens", "fc"])
    tensors = {"embed_tokens.weight": np.ones((30, 8), np.float32), "fc.weight": np.ones((5, 8), np.float32)}
    # transformers leaves its own default out of a config.
    for number, told in enumerate(({"tie_word_embeddings": True}, {"architectures": ["GPT2LMHeadModel"]})):
        with write_base(tmp_path / f"tied{number}", tensors, **told) as opened:
            found = refused(ExpertsIncompatible, tmp_path / "out", [expert], [1], output={"kind": "full"}, base=opened)
        assert "embed_tokens.weight is also the head" in found.detail
    with write_base(tmp_path / "own", tensors, tie_word_embeddings=False) as opened:
        merge(tmp_path / "out", [expert], [1.0], output={"kind": "full"}, base=opened)
    found = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    np.testing.assert_allclose(found, 1 + 4 * 2 * np.ones((30, 8)), atol=1e-5)


@pytest.mark.parametrize("kind", ["delta", "full"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_that_is_stopped_leaves_no_weights(tmp_path, pair, base, kind, method):
    with pytest.raises(run.Cancelled):
        merge(tmp_path / "out", pair, [1, 1], method, output={"kind": kind}, base=base, cancelled=lambda: True)
    assert not list((tmp_path / "out").glob("*"))


# What holds for every output


def effect(folder, kind, base):
    """What a written merge adds to the base, by tensor."""
    if kind == "lora":
        return {f"{name}.weight": delta for name, delta in deltas(folder).items()}
    if kind == "full":
        own = load_file(base.folder / "model.safetensors")
        merged = load_file(folder / "model.safetensors")
        return {f"{name}.weight": merged[f"{name}.weight"] - own[f"{name}.weight"] for name in (Q, V)}
    return load_file(folder / "delta.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_of_weight_one_is_itself(tmp_path, pair, base, kind):
    for method in ("linear", "ties", "dare"):
        parameters = {} if method == "linear" else {"density": 1.0}
        out = tmp_path / method
        merge(out, pair[:1], [1.0], method, parameters=parameters, output={"kind": kind}, base=base)
        for name, delta in effect(out, kind, base).items():
            np.testing.assert_allclose(delta, expected(pair[0], 2, name.removesuffix(".weight")), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_order_of_experts_changes_no_byte_and_another_gauge_no_delta(tmp_path, base, kind, method):
    rng = np.random.default_rng(3)
    factors = {name: (rng.normal(size=(rows, 4)), rng.normal(size=(4, 16))) for name, rows in ((Q, 24), (V, 12))}
    turn = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    turned = {name: (B @ turn, np.linalg.inv(turn) @ A) for name, (B, A) in factors.items()}
    one, same = write(tmp_path / "one", factors, alpha=4), write(tmp_path / "same", turned, alpha=4)
    other = write(tmp_path / "other", {Q: (24, 16, 2), V: (12, 16, 2)}, alpha=2)
    options = {"output": {"kind": kind}, "base": base}
    merge(tmp_path / "forth", [one, other], [0.6, 0.4], method, **options)
    merge(tmp_path / "back", [other, one], [0.4, 0.6], method, **options)
    merge(tmp_path / "gauge", [same, other], [0.6, 0.4], method, **options)
    for path in (tmp_path / "forth").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
    forth, gauge = (effect(tmp_path / name, kind, base) for name in ("forth", "gauge"))
    for name, delta in forth.items():
        # TIES may keep another value where two lie at the cut: next to none do.
        assert (np.abs(delta - gauge[name]) > 1e-4).mean() < 0.02


@pytest.mark.parametrize("kind", ["delta", "full"])
def test_the_same_bytes_come_from_any_number_of_threads(tmp_path, pair, base, kind):
    for threads in (1, 3):
        merge(tmp_path / str(threads), pair, [1, 1], "ties", output={"kind": kind}, base=base, threads=threads)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


# Energy


def test_a_share_of_energy_gives_each_module_its_smallest_rank_and_the_file_the_largest(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], output={"rank": {"energy": 0.95}})
    needed = {}
    for module, delta in summed(pair).items():
        kept = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2) / np.linalg.norm(delta) ** 2
        needed[module] = int(np.flatnonzero(kept >= 0.95)[0]) + 1
        found = next(item for item in report.modules if item.name == module)
        assert found.rank == needed[module]
        assert found.energy_kept == pytest.approx(kept[needed[module] - 1], abs=1e-5)
    assert needed[Q] != needed[V]
    assert report.rank == max(needed.values())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == report.rank
    for module, delta in summed(pair).items():
        assert np.linalg.norm(deltas(tmp_path / "out")[module] - delta) ** 2 <= 0.05 * np.linalg.norm(delta) ** 2
    assert not report.warnings[1:]


def test_cat_keeps_every_factor_and_so_takes_no_share(tmp_path, pair):
    found = refused(RecipeInvalid, tmp_path / "out", pair, [1, 1], "cat", output={"rank": {"energy": 0.9}})
    assert (found.pointer, found.wanted) == ("/output/rank", "at least 8, or null")


def test_too_little_energy_names_the_rank_that_would_be_enough(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], output={"rank": 1})
    squares = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in summed(pair).values()]
    whole = sum(part.sum() for part in squares)
    shares = [sum(part[:rank].sum() for part in squares) / whole for rank in range(1, 9)]
    needed = next(rank for rank, share in enumerate(shares, 1) if share >= 0.9)
    assert needed > 2
    assert any(f"Rank 1 keeps {shares[0]:.1%}" in text and f"Rank {needed} would keep 90%" in text
               for text in report.warnings)  # fmt: skip
    assert merge(tmp_path / "enough", pair, [0.7, 0.3], output={"rank": needed}).energy_kept >= 0.9
    assert merge(tmp_path / "less", pair, [0.7, 0.3], output={"rank": needed - 1}).energy_kept < 0.9


def test_where_the_rank_is_not_known_an_estimate_from_below_is_told_as_one(tmp_path):
    """Larger than what an exact SVD is used for, and merged by a method whose result is not of low rank."""
    experts = [write(tmp_path / name, {Q: (300, 290, 8)}) for name in "ab"]
    report = merge(tmp_path / "out", experts, [1, 1], "ties", output={"rank": 8})
    merge(tmp_path / "dense", experts, [1, 1], "ties", output={"kind": "delta"})
    squares = np.linalg.svd(load_file(tmp_path / "dense" / "delta.safetensors")[f"{Q}.weight"], compute_uv=False) ** 2
    truth = int(np.flatnonzero(np.cumsum(squares) >= 0.9 * squares.sum())[0]) + 1
    told = next(text for text in report.warnings if text.startswith("Rank 8 keeps"))
    assert "By an estimate it takes rank" in told
    assert 8 < int(told.split("it takes rank ")[1].split()[0]) <= truth
    assert "Output delta keeps everything" in told


# Saved tensors and biases


def with_head(folder, values, *, rank=2, name=HEAD, **config):
    settings = {"modules_to_save": [name.removesuffix(".weight")]} | config
    return write(folder, {Q: (24, 16, rank)}, alpha=rank, tensors={name: values}, **settings)


def head(seed, rows=7):
    return np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)


def saved(folder, name=HEAD):
    return load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}"]


def test_saved_tensors_are_merged_as_changes_of_the_base(tmp_path, base):
    pair = [with_head(tmp_path / "a", head(1)), with_head(tmp_path / "b", head(2))]
    own = tensors_of_base()[HEAD].astype(np.float64)
    wanted = own + 0.7 * (head(1) - own) + 0.3 * (head(2) - own) * 2
    report = merge(tmp_path / "lora", pair, [0.7, 0.6], base=base)
    np.testing.assert_allclose(saved(tmp_path / "lora"), wanted, atol=1e-5)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    assert not report.kept
    merge(tmp_path / "full", pair, [0.7, 0.6], output={"kind": "full"}, base=base)
    np.testing.assert_allclose(load_file(tmp_path / "full" / "model.safetensors")[HEAD], wanted, atol=1e-5)
    merge(tmp_path / "delta", pair, [0.7, 0.6], output={"kind": "delta"}, base=base)
    np.testing.assert_allclose(load_file(tmp_path / "delta" / "delta.safetensors")[HEAD], wanted - own, atol=1e-5)


def test_saved_tensors_of_one_expert_of_weight_one_come_back(tmp_path, base):
    for name, weights in (("with", base), ("without", None)):
        merge(tmp_path / name, [with_head(tmp_path / f"{name}-a", head(1))], [1.0], base=weights)
        np.testing.assert_allclose(saved(tmp_path / name), head(1), atol=1e-6)


def test_saved_tensors_that_nobody_contradicts_are_kept(tmp_path):
    same = [with_head(tmp_path / "a", head(1)), with_head(tmp_path / "b", head(1), rank=3)]
    alone = [with_head(tmp_path / "c", head(1)), write(tmp_path / "d", {Q: (24, 16, 2)})]
    for name, experts, keeper in (("same", same, "acme/a"), ("alone", alone, "acme/c")):
        for weights in ([0.7, 0.3], [2.0, -1.0]):
            out = tmp_path / f"{name}{weights[0]}"
            report = merge(out, experts, weights)
            assert saved(out).tobytes() == head(1).tobytes()
            assert report.kept.keys() == {HEAD}
            assert report.kept[HEAD] in {keeper, "acme/b"}


def test_saved_tensors_that_differ_are_refused_until_an_expert_is_named(tmp_path):
    pair = [with_head(tmp_path / "a", head(1)), with_head(tmp_path / "b", head(2))]
    found = refused(ExpertsIncompatible, tmp_path / "out", pair, [1, 1])
    assert found.pointer == "/output/saved"
    for word in ("acme/a", "acme/b", HEAD):
        assert word in found.detail
    for word in ("output.saved", "add_base_weights"):
        assert word in found.remedy
    for number, name in enumerate("ab", 1):
        report = merge(tmp_path / f"kept-{name}", pair, [1, 1], output={"saved": f"acme/{name}"})
        assert saved(tmp_path / f"kept-{name}").tobytes() == head(number).tobytes()
        assert report.kept == {HEAD: f"acme/{name}"}
    found = refused(RecipeInvalid, tmp_path / "out", pair, [1, 1], output={"saved": "acme/c"})
    assert (found.pointer, found.met) == ("/output/saved", "acme/c")


def test_naming_an_expert_keeps_its_tensors_also_where_they_could_be_merged(tmp_path, base):
    pair = [with_head(tmp_path / "a", head(1)), with_head(tmp_path / "b", head(2))]
    own = tensors_of_base()[HEAD]
    for kind, wanted in (("full", head(2)), ("delta", head(2) - own)):
        merge(tmp_path / kind, pair, [1, 1], output={"kind": kind, "saved": "acme/b"}, base=base)
        file = "model.safetensors" if kind == "full" else "delta.safetensors"
        np.testing.assert_allclose(load_file(tmp_path / kind / file)[HEAD], wanted, atol=1e-6)


def test_vocabularies_of_different_sizes_are_refused_by_tensor_and_sizes(tmp_path, base):
    pair = [with_head(tmp_path / "a", head(1)), with_head(tmp_path / "b", head(2, rows=9))]
    for options in ({}, {"base": base}):
        found = refused(ExpertsIncompatible, tmp_path / "out", pair, [1, 1], **options)
        for word in (HEAD, "[9, 16] in acme/b", "[7, 16] in acme/a", "vocabularies"):
            assert word in found.detail


def test_what_a_kept_tensor_adds_to_the_base_is_not_known_without_the_base(tmp_path):
    found = refused(
        ExpertsIncompatible, tmp_path / "out", [with_head(tmp_path / "a", head(1))], [1.0], output={"kind": "delta"}
    )
    assert HEAD in found.detail
    assert not (tmp_path / "out").exists()


def test_a_saved_tensor_that_is_not_finite_is_refused_by_name(tmp_path, base):
    broken = head(1)
    broken[3, 2] = np.nan
    pair = [with_head(tmp_path / "a", head(2)), with_head(tmp_path / "b", broken)]
    for options in ({"base": base}, {"output": {"saved": "acme/b"}}):
        with pytest.raises(ExpertsIncompatible, match="acme/b holds NaN"):
            merge(tmp_path / "out", pair, [1, 1], **options)


def test_parts_that_peft_could_not_hold_together_are_refused_before_anything_is_merged(tmp_path, base):
    saves = with_head(tmp_path / "a", head(1))
    adapts = write(tmp_path / "b", {"lm_head": (7, 16, 2)})
    seen = []
    with pytest.raises(AdapterInvalid, match="lm_head"):
        merge(tmp_path / "out", [saves, adapts], [1, 1], progress=seen.append)
    assert not seen
    with pytest.raises(ExpertsIncompatible, match="lm_head"):
        merge(tmp_path / "out", [saves, adapts], [1, 1], output={"kind": "full"}, base=base, progress=seen.append)
    assert not seen
    assert not (tmp_path / "out").exists()


def test_biases_of_the_adapters_own_are_summed_with_their_scaling(tmp_path):
    """One of the two has them, with a scaling of 3."""
    bias = np.random.default_rng(5).normal(size=24).astype(np.float32)
    first = write(tmp_path / "a", {Q: (24, 16, 2)}, alpha=6, lora_bias=True, tensors={f"{Q}.lora_B.bias": bias})
    second = write(tmp_path / "b", {Q: (24, 16, 2)}, alpha=2)
    merge(tmp_path / "out", [first, second], [0.5, 0.5])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is True
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_B.bias"]
    np.testing.assert_allclose(found, 0.5 * 3 * bias, atol=1e-6)
    merge(tmp_path / "delta", [first, second], [0.5, 0.5], output={"kind": "delta"})
    np.testing.assert_allclose(
        load_file(tmp_path / "delta" / "delta.safetensors")[f"{Q}.bias"], 0.5 * 3 * bias, atol=1e-6
    )


def test_a_bias_that_the_base_does_not_have_cannot_become_part_of_it(tmp_path, base):
    expert = write(tmp_path / "a", {Q: (24, 16, 2)}, lora_bias=True, tensors={f"{Q}.lora_B.bias": np.ones(24)})
    found = refused(ExpertsIncompatible, tmp_path / "out", [expert], [1.0], output={"kind": "full"}, base=base)
    assert f"acme/a changes {Q}.bias" in found.detail
    assert not (tmp_path / "out").exists()


# IA3


def test_ia3_averages_what_each_gain_is_more_than_one(tmp_path):
    one = write_ia3(tmp_path / "a", {Q: [1.5, 1.0, 0.25], V: [2.0, 1.0]}, feedforward=[V])
    two = write_ia3(tmp_path / "b", {Q: [0.5, 1.0, 1.25], V: [1.0, 3.0]}, feedforward=[V])
    report = merge(tmp_path / "out", [one, two], [0.5, 2.0], output={"kind": "ia3"})
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_allclose(found[f"base_model.model.{Q}.ia3_l"], [[0.25], [1.0], [1.125]], atol=1e-6)
    np.testing.assert_allclose(found[f"base_model.model.{V}.ia3_l"], [[1.5, 5.0]], atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["target_modules"], config["feedforward_modules"]) == ("IA3", [Q, V], [V])
    assert (report.kind, report.rank, report.energy_kept) == ("ia3", None, 1.0)


def test_ties_elects_among_the_gains(tmp_path):
    """l - 1 is 0.4, -0.3, 0.1 and 0.2, 0.6, -0.5: of the two largest of each, plus wins in the middle."""
    one = write_ia3(tmp_path / "a", {Q: [1.4, 0.7, 1.1]})
    two = write_ia3(tmp_path / "b", {Q: [1.2, 1.6, 0.5]})
    merge(
        tmp_path / "out", [one, two], [1, 1], "ties", parameters={"density": 0.67, "variant": "peft"},
        output={"kind": "ia3"},
    )  # fmt: skip
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{Q}.ia3_l"].ravel()
    np.testing.assert_allclose(found, [1.4, 1.6, 0.5], atol=1e-6)


def test_families_are_not_mixed_without_the_base(tmp_path, pair, base):
    ia3 = write_ia3(tmp_path / "ia3", {Q: np.linspace(0.5, 1.5, 24)})
    found = refused(ExpertsIncompatible, tmp_path / "out", [pair[0], ia3], [1, 1], output={"kind": "ia3"})
    assert "acme/first is lora" in found.detail
    found = refused(ExpertsIncompatible, tmp_path / "out", [pair[0], ia3], [1, 1])
    assert "acme/ia3 is IA3" in found.detail
    assert "add_base_weights" in found.remedy
    found = refused(ExpertsIncompatible, tmp_path / "out", [ia3], [1])
    assert "output.kind ia3" in found.remedy
    with_base = disk.load(tmp_path / "ia3", base=base)
    merge(tmp_path / "both", [pair[0], with_base], [0.5, 1.0], output={"kind": "delta"}, base=base)
    gain = np.linspace(0.5, 1.5, 24)[:, None].astype(np.float32) - 1
    wanted = 0.5 * expected(pair[0], 2) + gain * tensors_of_base()[f"{Q}.weight"]
    found = load_file(tmp_path / "both" / "delta.safetensors")
    np.testing.assert_allclose(found[f"{Q}.weight"], wanted, atol=1e-5)


def test_experts_that_multiply_different_sides_of_a_module_are_refused(tmp_path):
    one = write_ia3(tmp_path / "a", {Q: np.ones(16)}, feedforward=[Q])
    two = write_ia3(tmp_path / "b", {Q: np.ones(16)})
    found = refused(ExpertsIncompatible, tmp_path / "out", [one, two], [1, 1], output={"kind": "ia3"})
    assert Q in found.detail
    assert "acme/" in found.detail


# Reports


def test_a_report_of_many_modules_stays_small_and_tells_the_worst(tmp_path):
    modules = {f"layers.{i}": (6, 5, 2) for i in range(MOST_MODULES_TOLD + 40)}
    report = merge(tmp_path / "out", [write(tmp_path / "a", modules)], [1.0], output={"rank": 1})
    told = report.to_dict()
    assert len(report.modules) == told["modules_total"] == MOST_MODULES_TOLD + 40
    shares = sorted(module.energy_kept for module in report.modules)
    assert sorted(module["energy_kept"] for module in told["modules"]) == shares[:MOST_MODULES_TOLD]
    assert len(json.dumps(told)) < 200_000
    assert {"device", "blas", "numpy", "python", "moerge"} == told["environment"].keys()
    assert told["environment"]["numpy"] == np.__version__


def test_what_was_measured_goes_through_json(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], output={"kind": "delta"})
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["kind"], told["rank"], told["missing"]) == ("delta", None, {V: ["acme/second"]})


def test_a_recipe_of_any_output_survives_a_trip_through_json(pair):
    for output in (
        {"kind": "full"},
        {"kind": "ternary", "density": 0.3},
        {"rank": {"energy": 0.9}},
        {"saved": "acme/first"},
    ):
        parsed = disk.parse(pair, [1, 1], output=output)
        assert recipe.parse(json.loads(json.dumps(parsed.to_dict()))).digest == parsed.digest


@pytest.mark.parametrize("method", [name for name, spec in merging.catalogue().items() if not spec.needs])
def test_every_method_merges_gains(tmp_path, method):
    rng = np.random.default_rng(2)
    experts = [write_ia3(tmp_path / name, {Q: rng.normal(1, 0.3, 24), V: rng.normal(1, 0.3, 12)}) for name in "ab"]
    merge(tmp_path / "out", experts, [0.7, 0.3], method, output={"kind": "ia3"})
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module, length in ((Q, 24), (V, 12)):
        gain = found[f"base_model.model.{module}.ia3_l"]
        assert gain.shape == (length, 1)
        assert np.isfinite(gain).all()
        assert np.abs(gain - 1).max() > 1e-3
