"""Recipes carried out on adapters on disk: what is written, what is reported, what is refused."""

import json
import tracemalloc

import numpy as np
import pytest
import threadpoolctl

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import cost, recipe, run
from moerge.tensors import header
from tests.unit.merging.disk import Q, V, deltas, expected, load, merge, write


@pytest.fixture
def pair(tmp_path):
    """Different ranks, scalings (one rsLoRA, one with a pattern) and partly overlapping modules."""
    first = write(tmp_path / "first", {Q: (24, 16, 3), V: (12, 16, 3)}, alpha=6)
    second = write(tmp_path / "second", {Q: (24, 16, 5)}, alpha=3, use_rslora=True)
    return first, second


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "cat"])
def test_the_sum_of_weighted_scaled_deltas_is_written(tmp_path, pair, method):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], method)
    found = deltas(tmp_path / "out")
    wanted = 0.7 * expected(pair[0], 6 / 3) + 0.3 * expected(pair[1], 3 / 5**0.5)
    np.testing.assert_allclose(found[Q], wanted, atol=1e-5)
    np.testing.assert_allclose(found[V], 0.7 * expected(pair[0], 2, V), atol=1e-5)
    assert (report.rank, report.energy_kept) == (8, 1.0)


def test_a_weight_below_zero_takes_a_delta_away(tmp_path, pair):
    merge(tmp_path / "out", pair, [1.0, -0.5])
    wanted = expected(pair[0], 2) - 0.5 * expected(pair[1], 3 / 5**0.5)
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], wanted, atol=1e-5)


def test_svd_writes_the_best_delta_of_the_largest_rank_and_says_what_it_keeps(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3], "svd")
    summed = 0.7 * expected(pair[0], 2) + 0.3 * expected(pair[1], 3 / 5**0.5)
    U, S, Vt = np.linalg.svd(summed)
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], (U[:, :5] * S[:5]) @ Vt[:5], atol=1e-5)
    assert report.rank == 5
    modules = {module.name: module for module in report.modules}
    assert modules[Q].energy_kept == pytest.approx((S[:5] ** 2).sum() / (S**2).sum(), rel=1e-5)
    assert modules[Q].norm == pytest.approx(np.linalg.norm(summed), rel=1e-5)
    # The other module has rank 3 and is kept whole; the overall share weighs both by their squared norm.
    norm = np.linalg.norm(0.7 * expected(pair[0], 2, V))
    assert modules[V].energy_kept == 1
    assert modules[V].rank == 3
    whole = (S**2).sum() + norm**2
    assert report.energy_kept == pytest.approx(((S[:5] ** 2).sum() + norm**2) / whole, rel=1e-5)


def test_a_dense_method_is_truncated_to_the_best_delta_of_its_rank(tmp_path, pair):
    """TIES of PEFT at density 0.5, worked out here on the dense deltas."""
    report = merge(
        tmp_path / "out", pair, [0.7, 0.3], "ties", parameters={"variant": "peft", "density": 0.5}, output={"rank": 4}
    )
    both = np.stack([expected(pair[0], 2), expected(pair[1], 3 / 5**0.5)])
    cut = [np.sort(np.abs(delta).ravel())[-24 * 16 // 2] for delta in both]
    trimmed = both * (np.abs(both) >= np.array(cut)[:, None, None])
    agree = np.sign(trimmed) == np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    merged = (np.array([0.7, 0.3])[:, None, None] * trimmed * agree).sum(axis=0) / np.maximum(
        (agree & (trimmed != 0)).sum(axis=0), 1
    )
    U, S, Vt = np.linalg.svd(merged)
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], (U[:, :4] * S[:4]) @ Vt[:4], atol=1e-4)
    module = next(module for module in report.modules if module.name == Q)
    assert module.energy_kept == pytest.approx((S[:4] ** 2).sum() / (S**2).sum(), rel=1e-4)  # fmt: skip


def test_too_little_energy_is_a_warning_and_enough_is_none(tmp_path, pair):
    poor = merge(tmp_path / "poor", pair, [0.7, 0.3], output={"rank": 1})
    assert poor.energy_kept < 0.9
    assert any("Rank 1 keeps" in warning for warning in poor.warnings)
    assert not any("keeps" in warning for warning in merge(tmp_path / "rich", pair, [0.7, 0.3]).warnings)


def test_modules_that_an_expert_lacks_are_listed(tmp_path, pair):
    report = merge(tmp_path / "out", pair, [0.7, 0.3])
    assert report.missing == {V: ("acme/second",)}
    assert "1 of 2 modules are missing in some experts, and add nothing there." in report.warnings
    assert json.loads(json.dumps(report.to_dict()))["missing"] == {V: ["acme/second"]}


def test_a_missing_module_is_a_zero_delta_or_leaves_its_expert_out(tmp_path, pair):
    for missing, weight in (("zero", 0.75), ("skip", 1.0)):
        parameters = {"normalize": True, "missing": missing}
        merge(tmp_path / missing, pair, [1.5, 0.5], parameters=parameters)
        np.testing.assert_allclose(deltas(tmp_path / missing)[V], weight * expected(pair[0], 2, V), atol=1e-5)


def test_the_rank_asked_for_is_the_rank_written(tmp_path, pair):
    for rank in (2, 8, 30):
        report = merge(tmp_path / str(rank), pair, [0.7, 0.3], output={"rank": rank})
        assert json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())["r"] == report.rank == rank
    wanted = 0.7 * expected(pair[0], 2) + 0.3 * expected(pair[1], 3 / 5**0.5)
    np.testing.assert_allclose(deltas(tmp_path / "30")[Q], wanted, atol=1e-5)


def test_cat_refuses_a_rank_that_does_not_hold_every_factor(tmp_path, pair):
    with pytest.raises(RecipeInvalid) as caught:
        merge(tmp_path / "out", pair, [0.7, 0.3], "cat", output={"rank": 7})
    assert (caught.value.pointer, caught.value.met, caught.value.wanted) == ("/output/rank", 7, "at least 8, or null")
    assert not (tmp_path / "out").exists()


def test_a_rank_beyond_the_matrix_is_not_written_by_default(tmp_path):
    experts = [write(tmp_path / name, {Q: (6, 40, 4)}) for name in "abc"]
    assert merge(tmp_path / "out", experts, [1, 1, 1]).rank == 6
    wanted = sum(expected(adapter, 2) for adapter in experts)
    np.testing.assert_allclose(deltas(tmp_path / "out")[Q], wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for_is_written(tmp_path, pair, dtype):
    merge(tmp_path / "out", pair, [0.7, 0.3], output={"dtype": dtype})
    merged = load(tmp_path / "out").modules[Q]
    wanted = 0.7 * expected(pair[0], 2) + 0.3 * expected(pair[1], 3 / 5**0.5)
    step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    error = np.abs(merged.delta() - wanted).max()
    assert 0 < error < 8 * step * np.abs(wanted).max()
    stored = {info.dtype for info in header.read(tmp_path / "out" / "adapter_model.safetensors").tensors.values()}
    assert stored == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare", "iso_c"])
def test_the_same_bytes_are_written_whoever_computes_them(tmp_path, method):
    modules = {Q: (700, 300, 4), V: (300, 300, 4)}
    experts = [write(tmp_path / name, modules, alpha=alpha) for name, alpha in (("a", 3), ("b", 9), ("c", 4))]
    weights = [0.5, 1.0, -0.25]
    options = [{}, {"threads": 3}, {"memory_bytes": 1 << 32}]
    bodies = set()
    for number, extra in enumerate(options):
        merge(tmp_path / f"out{number}", experts, weights, method, **extra)
        bodies.add((tmp_path / f"out{number}" / "adapter_model.safetensors").read_bytes())
    for limit in (1, 2, 4):
        with threadpoolctl.threadpool_limits(limits=limit, user_api="blas"):
            merge(tmp_path / f"blas{limit}", experts[::-1], weights[::-1], method)
        bodies.add((tmp_path / f"blas{limit}" / "adapter_model.safetensors").read_bytes())
    assert len(bodies) == 1


def test_a_merge_that_needs_more_memory_than_there_is_is_refused_before_it_begins(tmp_path, pair):
    with pytest.raises(RecipeInvalid) as caught:
        merge(tmp_path / "out", pair, [0.7, 0.3], "ties", memory_bytes=1 << 20)
    assert caught.value.wanted == 1 << 20
    assert caught.value.met > 1 << 20
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "most_bytes"), [("linear", 6 << 20), ("ties", 26 << 20)])
def test_eight_large_deltas_never_lie_in_memory_together(tmp_path, method, most_bytes):
    """Eight dense deltas of 1536 x 1536 are 72 MiB; a sum needs none of them, TIES the merged one and blocks."""
    experts = [write(tmp_path / f"e{i}", {Q: (1536, 1536, 2)}) for i in range(8)]
    merge(tmp_path / "warm", experts[:1], [1], method)
    tracemalloc.start()
    merge(tmp_path / "out", experts, [1] * 8, method, memory_bytes=1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < most_bytes


def test_progress_rises_to_one(tmp_path, pair):
    for method in ("linear", "ties", "iso_c", "opcm"):
        seen = []
        merge(tmp_path / method, pair, [0.7, 0.3], method, progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert len(seen) > 2


def test_progress_is_told_a_hundred_times_at_most(tmp_path):
    modules = {f"layer.{i}": (8, 8, 1) for i in range(300)}
    seen = []
    merge(tmp_path / "out", [write(tmp_path / "a", modules)], [1.0], progress=seen.append)
    assert 50 < len(seen) <= 101


@pytest.mark.parametrize(
    ("method", "rank"), [("linear", 8), ("ties", None), ("ties", 32), ("iso_c", None), ("opcm", None)]
)
def test_a_merge_takes_no_more_memory_than_was_said_before(tmp_path, method, rank):
    modules = {f"layer.{i}": (700, 900, 4) for i in range(6)}
    experts = [write(tmp_path / name, modules) for name in "abc"]
    shapes = dict.fromkeys(modules, (700, 900))
    merge(tmp_path / "warm", experts[:1], [1], method)
    tracemalloc.start()
    merge(tmp_path / "out", experts, [1, 1, 1], method, output={"rank": rank})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    named = [{"expert": name, "revision": "r", "digest": name, "weight": 1} for name in "abc"]
    parsed = recipe.parse({"method": method, "experts": named, "output": {"rank": rank}})
    sizes = [{name: (*shape, 4) for name, shape in shapes.items()}] * 3
    told = cost.estimate(parsed.spec, parsed.output, sizes).memory_bytes
    # What the interpreter and its libraries need is in the estimate and not in this peak.
    assert peak < told - cost.FIXED_BYTES
    assert told < cost.FIXED_BYTES + 8 * peak


@pytest.mark.parametrize("method", ["linear", "ties", "iso_c", "opcm"])
def test_a_merge_that_is_no_longer_wanted_stops_and_writes_nothing(tmp_path, pair, method):
    with pytest.raises(run.Cancelled):
        merge(tmp_path / "out", pair, [0.7, 0.3], method, cancelled=lambda: True)
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_refused_with_expert_and_module(tmp_path, pair):
    B, A = np.ones((24, 2)), np.ones((2, 16))
    B[3, 1] = np.nan
    with pytest.raises(ExpertsIncompatible, match=rf"acme/broken holds NaN or infinity in {Q}"):
        merge(tmp_path / "out", [pair[0], write(tmp_path / "broken", {Q: (B, A)})], [0.5, 0.5])


def test_a_merge_that_overflows_is_refused(tmp_path):
    huge = write(tmp_path / "huge", {Q: (np.full((4, 1), 1e30), np.full((1, 4), 1e30))})
    for method in ("svd", "ties", "linear"):
        with pytest.raises(ExpertsIncompatible, match="not finite"), np.errstate(all="ignore"):
            merge(tmp_path / method, [huge, huge], [1e6, 1e6], method)


def test_modules_of_different_shapes_are_refused_with_both_experts(tmp_path, pair):
    other = write(tmp_path / "other", {Q: (20, 16, 3)})
    with pytest.raises(ExpertsIncompatible, match=rf"{Q} has shape") as caught:
        merge(tmp_path / "out", [pair[0], other], [0.5, 0.5])
    assert "acme/first" in caught.value.detail
    assert "acme/other" in caught.value.detail


def test_different_bases_are_refused_unless_the_recipe_says_that_they_are_one(tmp_path, pair):
    other = write(tmp_path / "other", {Q: (24, 16, 3)}, base="acme/other")
    with pytest.raises(ExpertsIncompatible, match="acme/other"):
        merge(tmp_path / "out", [pair[0], other], [0.5, 0.5], base_model=None)
    merge(tmp_path / "out", [pair[0], other], [0.5, 0.5], base_model="acme/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"


def test_an_adapter_that_was_not_handed_in_is_named(tmp_path, pair):
    parsed = recipe.parse(
        {"method": "linear", "experts": [{"expert": "acme/x", "revision": "r", "digest": "d", "weight": 1}]}
    )
    with pytest.raises(ExpertsIncompatible, match="acme/x") as caught:
        run.merge(parsed, {}, tmp_path / "out")
    assert caught.value.pointer == "/experts/0"


def test_a_merge_that_is_zero_says_so(tmp_path, pair):
    report = merge(tmp_path / "out", pair[:1], [0.0])
    assert any("zero" in warning for warning in report.warnings)
    assert report.energy_kept == 1.0
