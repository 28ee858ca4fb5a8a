"""Shared and exclusive parts: put together they are the expert within the stated error, and the merge by its gates."""

import numpy as np
import pytest

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import arrays, exclusive
from moerge.merging.engine import Settings
from moerge.merging.sources import Factors
from tests.unit.merging import builders
from tests.unit.merging.builders import LETTERS, delta_of, dense_of

SETTINGS = {
    "twin_merging": [{}, {"density": 0.5, "scale": 0.1}, {"compress": "svd"}, {"compress": "svd", "directions": 2}],
    "one_bit": [{}, {"scale": 0.0}, {"modules": "mlp"}],
    "mediator": [{}, {"averaged": 0.0, "density": 0.4}],
}
EVERY = [(method, given) for method, several in SETTINGS.items() for given in several]
EXPERTS = {"dense": builders.dense(3), "low rank": builders.low_rank(3)}


def parts_of(split, expert):
    return {name: split.exclusive(name, expert) for name in split.names}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(("method", "given"), EVERY)
def test_shared_plus_exclusive_is_the_expert_within_the_stated_error(method, given, kind):
    experts = EXPERTS[kind]
    # Digests in another order than the experts, so that parts must be handed out by position.
    split = arrays.split(method, experts, parameters=given, digests=["c", "a", "b"])
    shared = {name: split.shared(name) for name in split.names}
    for position, expert in enumerate(experts):
        parts = parts_of(split, position)
        found = dense_of(exclusive.apply(shared, [{name: kept.part for name, kept in parts.items()}], [1.0]))
        for name, wanted in dense_of(expert).items():
            error = np.linalg.norm(found[name] - wanted)
            assert error == pytest.approx(parts[name].error, rel=1e-3, abs=1e-5 * np.linalg.norm(wanted)), name


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(("method", "given"), EVERY)
def test_a_merge_adds_the_exclusive_parts_by_the_recipes_weights(method, given, kind):
    experts, gates = EXPERTS[kind], [0.5, 1.0, -0.25]
    split = arrays.split(method, experts, parameters=given, digests=LETTERS[:3])
    shared = {name: split.shared(name) for name in split.names}
    parts = [{name: kept.part for name, kept in parts_of(split, position).items()} for position in range(3)]
    found = dense_of(exclusive.apply(shared, parts, gates))
    merged = dense_of(arrays.merge(method, experts, weights=gates, parameters=given, digests=LETTERS[:3]))
    for name, wanted in merged.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    alone = dense_of(exclusive.apply(shared, parts[1:2], [1.0]))
    assert "modules" in given or any(np.abs(alone[name] - found[name]).max() > 1e-3 for name in found)


def test_the_shared_part_of_twin_merging_is_task_arithmetic_of_equal_weights_and_that_of_mediator_the_mean():
    experts = EXPERTS["low rank"]
    for method, scale, given in (("twin_merging", 0.29, {"scale": 0.29}), ("mediator", 1 / 3, {})):
        split = arrays.split(method, experts, parameters=given)
        for name in split.names:
            shared = split.shared(name)
            assert isinstance(shared, Factors)
            wanted = scale * sum(delta_of(expert[name]) for expert in experts)
            np.testing.assert_allclose(shared.delta(), wanted, rtol=1e-4, atol=1e-5)


def test_twin_merging_keeps_a_share_of_the_values_or_of_the_directions():
    experts = EXPERTS["low rank"]
    split = arrays.split("twin_merging", experts, parameters={"density": 0.25})
    sizes = [split.exclusive("q", expert).part.places.size for expert in range(3)]
    assert sizes == [24 * 20 // 4] * 3
    kept = split.exclusive("q", 1).part
    left = delta_of(experts[1]["q"]) - 0.3 * sum(delta_of(expert["q"]) for expert in experts)
    np.testing.assert_array_equal(np.sort(kept.places), np.sort(np.abs(left).ravel().argsort()[-120:]))
    split = arrays.split("twin_merging", experts, parameters={"compress": "svd", "density": 0.25})
    found = split.exclusive("q", 1)
    assert found.part.rank == 5
    sizes = np.linalg.svd(left, compute_uv=False)
    assert found.error == pytest.approx(np.linalg.norm(sizes[5:]), rel=1e-4)


def test_parts_of_a_matrix_of_several_blocks_are_those_of_one():
    experts = builders.low_rank(2, shape=(300, 512), names=("w",))
    for method in ("twin_merging", "one_bit"):
        small, large = (
            arrays.split(method, experts, digests="ab", settings=Settings(block_values=size)).exclusive("w", 1)
            for size in (1, 1 << 22)
        )
        np.testing.assert_array_equal(small.part.delta(), large.part.delta())
        assert small.error == pytest.approx(large.error, rel=1e-9)
        left = delta_of(experts[1]["w"]) - 0.3 * sum(delta_of(expert["w"]) for expert in experts)
        assert np.linalg.norm(left - small.part.delta()) == pytest.approx(small.error, rel=1e-4)


def test_twin_merging_by_directions_stays_low_rank():
    merged = arrays.merge("twin_merging", EXPERTS["low rank"], parameters={"compress": "svd", "directions": 2})
    assert all(found.rank == 9 for found in merged.values())


def test_a_sign_code_takes_one_bit_per_value():
    split = arrays.split("one_bit", EXPERTS["low rank"])
    part = split.exclusive("q", 0).part
    assert part.bits.nbytes == 24 * 20 // 8
    assert set(np.unique(np.abs(part.delta()))) == {np.float32(part.scale)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"), ("model.layers.0.mlp.gate_proj", "mlp"),
        ("encoder.layer.1.attention.output.dense", "attention"), ("encoder.layer.1.intermediate.dense", "mlp"),
        ("transformer.h.3.attn.c_attn", "attention"), ("transformer.h.3.mlp.c_proj", "mlp"), ("lm_head", None),
        ("attention_tower.0.mlp.fc1", "mlp"), ("mlp_mixer.0.attn.proj", "attention"),
    ],
)  # fmt: skip
def test_one_bit_knows_attention_and_feed_forward_modules_by_name(name, kind):
    experts = [{name: np.array([1.0, -2.0])}, {name: np.array([3.0, 5.0])}]
    for modules in ("attention", "mlp"):
        split = arrays.split("one_bit", experts, parameters={"modules": modules})
        assert (split.exclusive(name, 0).part.scale > 0) == (modules == kind)


def test_mediator_averages_layers_without_conflict_and_keeps_the_rest_for_the_router():
    rng = np.random.default_rng(0)
    agreed = rng.random((6, 5))
    experts = [
        {"layers.0.q": agreed * size, "layers.1.q": rng.normal(size=(6, 5)), "layers.2.q": rng.normal(size=(6, 5))}
        for size in (1.0, 2.0)
    ]
    for averaged, routed in ((0.0, {"layers.1.q", "layers.2.q"}), (1.0, set()), (1 / 3, {"layers.1.q", "layers.2.q"})):
        split = arrays.split("mediator", experts, parameters={"averaged": averaged, "top": 1.0})
        assert {name for name in split.names if split.exclusive(name, 0).part.places.size} == routed


def test_gates_must_be_as_many_as_parts_and_methods_without_parts_are_refused():
    split = arrays.split("one_bit", EXPERTS["dense"])
    shared = {name: split.shared(name) for name in split.names}
    with pytest.raises(RecipeInvalid, match="2 gates for 0 exclusive parts"):
        exclusive.apply(shared, [], [0.5, 0.5])
    with pytest.raises(RecipeInvalid, match="linear makes no exclusive parts") as caught:
        arrays.split("linear", EXPERTS["dense"])
    assert caught.value.wanted == "one of mediator, one_bit, twin_merging"
    with pytest.raises(ExpertsIncompatible):
        arrays.split("one_bit", [])
