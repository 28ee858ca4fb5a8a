"""Identities between methods and of single methods that follow from their formulas."""

import numpy as np
import pytest

from moerge import merging
from moerge.merging import arrays
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import LETTERS, dense_of

EVERYTHING = {
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "cat": {},
    "dare": {"density": 1.0},
    "karcher": {},
    "layer_swapping": {},
    "lm_cocktail": {},
    "lorahub": {},
    "multislerp": {},
    "nuslerp": {},
    "peft_dare_linear": {"density": 1.0},
    "peft_dare_ties": {"density": 1.0},
    "peft_linear": {},
    "peft_magnitude_prune": {"density": 1.0},
    "peft_ties": {"density": 1.0},
    "slerp": {},
    "della": {"density": 1.0, "epsilon": 0.0, "scale": 1.0},
    "fisher": {},
    "knots": {},
    "linear": {},
    "lora_lego": {},
    "magmax": {},
    "magnitude_prune": {"density": 1.0},
    "mats": {},
    "mediator": {},
    "opcm": {},
    "regmean": {},
    "sce": {},
    "svd": {},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "tsv_m": {},
    "twin_merging": {"density": 1.0},
}
# A single expert is changed by these on purpose: values made equal, drowned, balanced, or voted away. AdaMerging
# has a coefficient of its own.
NO_IDENTITY = {"adamerging", "consensus_ta", "iso_c", "iso_cts", "one_bit", "pcb"}


def merge(method, experts, weights=None, *, seed=0, digests=None, statistics=None, **parameters):
    digests = digests or LETTERS[: len(experts)]
    needs = merging.catalogue()[method].needs
    return dense_of(
        arrays.merge(
            method,
            experts,
            weights=weights,
            parameters=parameters,
            seed=seed,
            digests=digests,
            statistics=builders.statistics(experts, digests, needs) if needs and statistics is None else statistics,
        )
    )


def assert_same(found, wanted, *, rtol=1e-5, atol=1e-7):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("method", sorted(set(EVERYTHING) - NO_IDENTITY))
def test_one_expert_of_weight_one_with_nothing_dropped_is_itself(method):
    (expert,) = builders.low_rank(1)
    assert_same(merge(method, [expert], **EVERYTHING[method]), dense_of(expert), rtol=1e-4, atol=1e-5)


def test_every_method_either_is_an_identity_on_one_expert_or_is_known_not_to_be():
    assert set(EVERYTHING) | NO_IDENTITY == set(merging.catalogue())


@pytest.mark.parametrize("variant", ["mergekit", "peft", "release"])
def test_ties_without_trimming_or_conflict_is_the_mean_of_what_is_not_zero(variant):
    experts = [{"w": np.abs(found["layer.weight"])} for found in builders.dense(3)]
    stacked = np.stack([expert["w"] for expert in experts])
    wanted = stacked.sum(axis=0) / np.maximum((stacked != 0).sum(axis=0), 1)
    assert_same(merge("ties", experts, variant=variant, density=1.0), {"w": wanted})


def test_ties_of_peft_doubles_when_all_weights_double_and_that_of_mergekit_does_not():
    experts = builders.dense(3)
    peft, mergekit = (merge("ties", experts, [1, 1, 1], variant=name) for name in ("peft", "mergekit"))
    assert_same(merge("ties", experts, [2, 2, 2], variant="peft"), {name: 2 * found for name, found in peft.items()})
    assert_same(merge("ties", experts, [2, 2, 2], variant="mergekit"), mergekit)


def test_consensus_of_nobody_is_task_arithmetic():
    experts, weights = builders.dense(3), [0.5, 1.0, -0.25]
    assert_same(
        merge("consensus_ta", experts, weights, min_experts=0, scale=0.6),
        merge("task_arithmetic", experts, weights, scale=0.6),
    )


@pytest.mark.parametrize("method", ["cat", "svd", "task_arithmetic"])
def test_methods_that_add_up_agree_with_linear(method):
    experts, weights = builders.low_rank(3), [0.5, 1.0, -0.25]
    assert_same(merge(method, experts, weights), merge("linear", experts, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [builders.dense(3), builders.low_rank(3)])
def test_knots_that_adds_up_is_task_arithmetic_and_that_of_the_same_drops_is_not(experts):
    weights = [0.5, 1.0, -0.25]
    wanted = merge("task_arithmetic", experts, weights, scale=0.6)
    assert_same(merge("knots", experts, weights, inner="sum", scale=0.6), wanted, rtol=1e-4, atol=1e-5)
    dropped = merge("knots", experts, weights, inner="dare", density=0.9, scale=0.6)
    assert all(np.abs(dropped[name] - wanted[name]).max() > 1e-4 for name in wanted)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_knots_gives_votes_that_cancel_to_plus_whatever_sign_the_svd_returns(sign):
    """Coordinates [1, -2] and [-1, 2] cancel; plus is elected, and 1 and 2 agree with it."""
    dense = [{"w": sign * np.array([[1.0, -2.0]])}, {"w": -sign * np.array([[1.0, -2.0]])}]
    low = [{"w": LowRank(found["w"], np.array([[1.0]]), 1.0)} for found in dense]
    for experts in (dense, low):
        assert_same(merge("knots", experts), {"w": np.array([[1.0, 2.0]])})


def test_knots_keeps_small_deltas_and_directions_and_stays_low_rank():
    experts = builders.low_rank(3, dtype=np.float64)
    small = [{n: LowRank(f.A, f.B * 1e-9, f.scaling) for n, f in expert.items()} for expert in experts]
    assert_same(
        {name: 1e9 * found for name, found in merge("knots", small, density=0.5).items()},
        merge("knots", experts, density=0.5),
        rtol=1e-6,
    )
    merged = arrays.merge("knots", experts, parameters={"density": 0.5})
    assert all(found.rank == 9 for found in merged.values())


def test_knots_ranks_coordinates_over_a_whole_expert():
    """Half of eight and one more are kept: all of the large tensor, one value of the small one."""
    expert = {"a": np.array([[4.0, -3.0, 5.0, 6.0]]), "b": np.array([[0.1, 0.2, -0.3, 0.4]])}
    assert_same(merge("knots", [expert], density=0.5), {"a": expert["a"], "b": np.array([[0.0, 0.0, 0.0, 0.4]])})


PLAIN_UNITS = {"restore_norm": False, "restore_variance": False}


def test_lora_lego_with_a_unit_of_its_own_for_each_is_cat():
    experts, weights = builders.low_rank(3), [0.5, 1.0, -0.25]
    for more in (9, 20):
        found = merge("lora_lego", experts, weights, units=more, **PLAIN_UNITS)
        assert_same(found, merge("cat", experts, weights), rtol=1e-4, atol=1e-5)


def test_lora_lego_does_not_see_the_order_of_units_their_gauge_or_units_of_zero():
    rng = np.random.default_rng(4)
    experts, weights = builders.low_rank(3, dtype=np.float64), [0.5, 1.0, -0.25]
    other = []
    for expert in experts:
        other.append({})
        for name, found in expert.items():
            order, gauge = rng.permutation(found.rank), rng.normal(size=found.rank)
            A, B = (found.A / gauge[:, None])[order], (found.B * gauge)[:, order]
            other[-1][name] = LowRank(np.vstack([A, A[:1]]), np.hstack([B, 0 * B[:, :1]]), found.scaling)
    for parameters in ({}, {"units": 2}, {"units": 3, **PLAIN_UNITS}):
        wanted = merge("lora_lego", experts, weights, **parameters)
        assert_same(merge("lora_lego", other, weights, **parameters), wanted, rtol=1e-8, atol=1e-10)


def test_lora_lego_finds_the_best_clusters_of_a_few_points():
    from itertools import product

    from moerge.merging.methods import lora_lego

    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.normal(size=(7, 3))

        def cost(labels, points=points):
            groups = [points[np.equal(labels, label)] for label in set(labels)]
            return sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups)

        found = cost(tuple(lora_lego.clusters(points @ points.T, 3).tolist()))
        assert found <= 1.02 * min(cost(labels) for labels in product(range(3), repeat=7) if len(set(labels)) == 3)


def test_lora_lego_leaves_no_unit_nearer_to_another_cluster_and_sees_no_order_among_many():
    from moerge.merging.methods import lora_lego

    rng = np.random.default_rng(1)
    points = rng.normal(size=(60, 5))
    labels = lora_lego.clusters(points @ points.T, 7)
    means = np.stack([points[labels == label].mean(axis=0) for label in range(7)])
    np.testing.assert_array_equal(((points[:, None] - means) ** 2).sum(axis=2).argmin(axis=1), labels)
    experts = builders.low_rank(3, ranks=(16,), dtype=np.float64)
    order = rng.permutation(16)
    other = [{n: LowRank(f.A[order], f.B[:, order], f.scaling) for n, f in expert.items()} for expert in experts]
    assert_same(merge("lora_lego", other, units=7), merge("lora_lego", experts, units=7), rtol=1e-8, atol=1e-10)


def test_lora_lego_puts_copies_of_a_unit_into_one_cluster():
    (expert,) = builders.low_rank(1)
    found = merge("lora_lego", [expert] * 3, digests=list("abc"))
    assert_same(found, dense_of(expert), rtol=1e-4, atol=1e-5)
    noisy = [{n: LowRank(f.A * (1 + i * 1e-3), f.B, f.scaling) for n, f in expert.items()} for i in range(3)]
    assert_same(merge("lora_lego", noisy), dense_of(expert), rtol=1e-2, atol=1e-2)


def test_lora_lego_restores_lengths_and_variance_by_what_averaging_took():
    experts = builders.low_rank(3)
    plain = merge("lora_lego", experts, units=2, **PLAIN_UNITS)
    louder = merge("lora_lego", experts, units=2, restore_norm=False)
    # The experts have 3, 2 and 4 units, 3 on average.
    assert_same(louder, {name: np.sqrt(3 / 2) * found for name, found in plain.items()}, rtol=1e-4, atol=1e-5)
    longer = merge("lora_lego", experts, units=2, restore_variance=False)
    assert all(np.linalg.norm(longer[name]) > 1.1 * np.linalg.norm(plain[name]) for name in plain)


def test_dare_that_drops_nothing_is_linear():
    experts, weights = builders.dense(3), [0.5, 1.0, -0.25]
    assert_same(merge("dare", experts, weights, density=1.0), merge("linear", experts, weights))


def test_della_without_a_window_is_dare_bit_for_bit():
    experts, weights = builders.dense(3), [0.5, 1.0, -0.25]
    della = merge("della", experts, weights, seed=4, density=0.3, epsilon=0.0, elect="none", normalize=False, scale=1.0)
    dare = merge("dare", experts, weights, seed=4, density=0.3)
    assert all(della[name].tobytes() == dare[name].tobytes() for name in dare)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"normalize": True}),
        ("ties", {}),
        ("sce", {}),
        ("magmax", {}),
        ("fisher", {}),
        ("regmean", {}),
        ("mats", {}),
        ("multislerp", {}),
        ("karcher", {}),
        ("lm_cocktail", {}),
    ],
)
def test_naming_every_expert_twice_changes_nothing(method, parameters):
    experts, weights = builders.dense(3), [0.5, 1.0, 0.25]
    once = merge(method, experts, weights, **parameters)
    twice = merge(method, experts * 2, weights * 2, digests=list("abcabc"), **parameters)
    assert_same(twice, once)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "opcm"])
def test_the_core_form_is_the_dense_formula_where_the_ranks_fill_the_matrix(method):
    experts = builders.low_rank(3, shape=(12, 12), ranks=(4, 4, 4), dtype=np.float64)
    dense = [dense_of(expert) for expert in experts]
    weights = [0.5, 1.0, 0.75]
    assert_same(merge(method, experts, weights), merge(method, dense, weights), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_spectral_methods_do_not_move_when_noise_fills_the_null_space(method):
    """On the dense product of low-rank factors, rounding decides; on cores it does not."""
    rng = np.random.default_rng(1)
    experts = builders.low_rank(3, shape=(40, 30), dtype=np.float64)
    noisy = [
        {
            name: LowRank(
                found.A * (1 + 1e-9 * rng.normal(size=found.A.shape)),
                found.B * (1 + 1e-9 * rng.normal(size=found.B.shape)),
                found.scaling,
            )
            for name, found in expert.items()
        }
        for expert in experts
    ]
    first, again = merge(method, experts), merge(method, noisy)
    assert_same(again, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_spectral_methods_take_duplicate_experts(method):
    experts = builders.low_rank(2)
    merged = merge(method, [experts[0], experts[1], experts[0]], digests=list("aba"))
    assert all(np.isfinite(found).all() and found.any() for found in merged.values())
    assert all(np.linalg.matrix_rank(found, tol=1e-4) <= 5 for found in merged.values())


def test_iso_c_makes_all_singular_values_the_mean_of_those_of_the_sum():
    experts, weights = builders.low_rank(3), [0.5, 1.0, 0.75]
    summed = merge("linear", experts, weights)["q"]
    found = np.linalg.svd(merge("iso_c", experts, weights, scale=2.0)["q"], compute_uv=False)
    np.testing.assert_allclose(found[:9], 2 * np.linalg.svd(summed, compute_uv=False)[:9].mean(), rtol=1e-5)
    assert found[9] < 1e-4


def test_opcm_goes_on_from_a_kept_state_as_if_it_had_not_stopped():
    from moerge.merging.methods import opcm
    from moerge.merging.sources import Source

    experts = builders.low_rank(3)
    parameters = opcm.SPEC.parse({"alpha": 0.4})
    state = None
    for expert in experts:
        source = Source("x", 1.0, expert)
        state = opcm.step(state, {name: source.read(name) for name in expert}, 1.0, parameters)
    assert_same(merge("opcm", experts, alpha=0.4), dense_of(opcm.finish(state)), rtol=1e-4, atol=1e-5)
    assert len(state.norms) == 3


def test_no_two_methods_agree_on_one_set_of_conflicting_experts():
    experts = builders.low_rank(4, seed=2, ranks=(3,), names=("layers.0.q", "layers.5.q", "head"))
    settings = {
        "linear": {"normalize": True}, "task_arithmetic": {"scale": 0.4}, "ties": {"density": 0.5}, "cat": {},
        "iso_c": {"scale": 0.7}, "iso_cts": {"scale": 0.7, "common": 0.3}, "tsv_m": {"scale": 0.7}, "magmax": {"scale": 0.6},
        "breadcrumbs": {"density": 0.5, "gamma": 0.1}, "magnitude_prune": {"density": 0.5}, "sce": {"select": 0.5},
        "layer_swapping": {"layers": "0-2=1; 5=0*0.5+2*0.7; other=3"},
        "slerp": {"t": 0.3}, "nuslerp": {"scope": "row"}, "multislerp": {}, "karcher": {}, "lm_cocktail": {"temperature": 2.0},
        "lorahub": {"composition": "release"}, "adamerging": {"scale": 0.8}, "peft_ties": {"density": 0.6},
        "peft_dare_linear": {"density": 0.7}, "peft_dare_ties": {"density": 0.7}, "peft_magnitude_prune": {"density": 0.6},
        # Left to run to its end it is RegMean.
        "mats": {"iterations": 1, "off_diagonal": 0.3},
    }  # fmt: skip
    flat = {}
    for method, spec in merging.catalogue().items():
        merged = merge(
            method,
            experts[: spec.most_experts],
            [0.5, 1.0, 0.8, -0.3][: spec.most_experts],
            seed=1,
            **settings.get(method, {}),
        )
        flat[method] = np.concatenate([found.ravel() for found in merged.values()])
    # cat and svd are the same sum; they differ in the rank they keep.
    names = sorted(set(flat) - {"svd"})
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            distance = np.linalg.norm(flat[one] - flat[other]) / np.linalg.norm(flat[one])
            assert distance > 1e-3, (one, other)
