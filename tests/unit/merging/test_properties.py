"""What follows from the formulas of all methods, on experts that chance picks: order, size, sign, gauge, absence, copies."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moerge import merging
from moerge.merging import arrays, kinship, selection
from moerge.merging.engine import Settings
from moerge.merging.methods import della
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import delta_of, dense_of

SPECS = merging.catalogue()
# These merge A and B apart from each other: they take equal ranks and see how a delta is split into factors.
APART = {name for name in SPECS if name.startswith("peft_")}
OF_DELTAS = sorted(set(SPECS) - APART)
# Order decides what comes first, or which of equals wins.
ORDERED = {name for name, spec in SPECS.items() if spec.is_ordered}
# Its noise belongs to the name of an expert.
RANDOM = {name for name, spec in SPECS.items() if spec.is_random} - {"knots"}
FEW = settings(max_examples=4, deadline=None)

seeds = st.integers(0, 2**32 - 1)
weights = st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, -0.5]), min_size=3, max_size=3).filter(
    lambda found: found[0] + min(0, found[1]) + min(0, found[2]) > 0.1
)


def merge(method, experts, given_weights=None, *, digests="abcdefgh", known=None, **parameters):
    """Merged deltas as dense float64; a method for few experts gets the first ones. `known` names the statistics."""
    most = SPECS[method].most_experts
    experts, digests, known = experts[:most], list(digests)[: len(experts)][:most], known or digests
    needs = SPECS[method].needs
    return dense_of(
        arrays.merge(
            method,
            experts,
            weights=given_weights[:most] if given_weights else None,
            parameters=parameters,
            seed=5,
            digests=digests,
            statistics=builders.statistics(experts, list(known)[: len(experts)], needs) if needs else None,
        )
    )


def assert_same(found, wanted, *, share=1e-6, names=None):
    """Each tensor within a share of its largest value."""
    assert names is not None or found.keys() == wanted.keys()
    for name in names or wanted:
        size = np.abs(wanted[name]).max(initial=0.0)
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=share * size + 1e-300, err_msg=name)


def normal(count, seed, *, shapes=None):
    """Dense float64 experts without equal values."""
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=shape) for name, shape in (shapes or {"w": (7, 6), "b": (5,)}).items()}
        for _ in range(count)
    ]


def lattice(count, seed):
    """Dense float64 experts of few values: zeros, equal magnitudes, votes that cancel."""
    rng = np.random.default_rng(seed)
    return [{"w": rng.integers(-3, 4, size=(4, 5)) / 4.0} for _ in range(count)]


def low_rank(seed, method="", **options):
    ranks = (3,) if method in APART else (3, 2, 4)
    return builders.low_rank(3, seed=seed, shape=(14, 12), ranks=ranks, dtype=np.float64, **options)


IDENTITY = {
    "linear": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "magmax": {},
    "sce": {"select": 1.0},
    "tsv_m": {},
    "knots": {"density": 1.0},
    "opcm": {},
    "fisher": {},
    "regmean": {},
    "cat": {},
}


@pytest.mark.parametrize("method", sorted(IDENTITY))
@FEW
@given(seed=seeds)
def test_one_expert_of_weight_one_with_nothing_dropped_is_itself(method, seed):
    for (expert,) in (normal(1, seed), lattice(1, seed), low_rank(seed)[:1]):
        if method == "tsv_m" and np.linalg.matrix_rank(delta_of(next(iter(expert.values())))) < 4:
            continue
        assert_same(merge(method, [expert], **IDENTITY[method]), dense_of(expert), share=1e-5)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "pcb", "consensus_ta", "breadcrumbs", "one_bit"])
def test_one_expert_is_not_itself_where_a_method_changes_it_on_purpose(method):
    (expert,) = normal(1, 0, shapes={"w": (12, 12)})
    parameters = {"breadcrumbs": {"density": 0.9, "gamma": 0.1}}.get(method, {})
    found = merge(method, [expert], **parameters)["w"]
    assert np.abs(found - expert["w"]).max() > 0.05 * np.abs(expert["w"]).max()


@pytest.mark.parametrize("method", sorted(set(SPECS) - ORDERED - RANDOM - {"slerp", "nuslerp", "layer_swapping"}))
@FEW
@given(seed=seeds, given_weights=weights)
def test_experts_in_another_canonical_order_give_the_same(method, seed, given_weights):
    """Other digests sort the experts otherwise, so that all sums run in another order."""
    if method == "karcher":
        # Weights below zero can put the mean where arcs do not balance, or hardly.
        given_weights = [abs(found) for found in given_weights]
    for experts in ([] if method in APART else [normal(3, seed)]) + [low_rank(seed, method)]:
        first = merge(method, experts, given_weights, digests="abc", known="abc")
        assert_same(merge(method, experts, given_weights, digests="zma", known="abc"), first)


@FEW
@given(seed=seeds, given_weights=weights, order=st.permutations(range(3)))
def test_the_order_of_experts_counts_in_magmax_for_ties_alone_and_not_where_ties_are_shared(seed, given_weights, order):
    def shuffled(experts, tie):
        return merge("magmax", [experts[i] for i in order], [given_weights[i] for i in order], tie=tie)

    for experts, tie in ((normal(3, seed), "last"), (normal(3, seed), "first"), (lattice(3, seed), "mean")):
        assert_same(shuffled(experts, tie), merge("magmax", experts, given_weights, tie=tie), share=1e-12)


def test_the_order_of_experts_counts_in_magmax_where_magnitudes_are_equal_and_in_opcm():
    one, other = {"w": np.array([[1.0, 2.0]])}, {"w": np.array([[-1.0, 0.5]])}
    np.testing.assert_array_equal(merge("magmax", [one, other])["w"], [[-1.0, 2.0]])
    np.testing.assert_array_equal(merge("magmax", [other, one])["w"], [[1.0, 2.0]])
    first, second = normal(2, 3)
    forth, back = merge("opcm", [first, second]), merge("opcm", [second, first])
    assert np.abs(forth["w"] - back["w"]).max() > 0.01


@pytest.mark.parametrize("method", sorted(set(SPECS) - {"pcb"}))
@FEW
@given(seed=seeds, given_weights=weights, factor=st.sampled_from([1e-6, 0.25, 3.0, 1e4, -1.0, -0.01]))
def test_a_common_factor_and_a_common_sign_go_through(method, seed, given_weights, factor):
    experts = low_rank(seed, method) if method in APART else normal(3, seed)
    if method in APART:
        # The factors are merged apart, so that both take the root; a sign goes to one of them.
        root = np.sqrt(abs(factor))
        scaled = [{n: LowRank(f.A * root, f.B * root, f.scaling) for n, f in expert.items()} for expert in experts]
        factor = abs(factor)
    else:
        scaled = [{name: factor * found for name, found in expert.items()} for expert in experts]
    first = merge(method, experts, given_weights)
    assert_same(merge(method, scaled, given_weights), {name: factor * found for name, found in first.items()})


def test_pcb_is_not_free_of_scale():
    experts = normal(3, 1)
    small, large = merge("pcb", experts)["w"], merge("pcb", [{n: 1e3 * f for n, f in e.items()} for e in experts])["w"]
    assert np.abs(large - 1e3 * small).max() > 0.01 * np.abs(large).max()


@FEW
@given(seed=seeds, given_weights=weights)
def test_methods_that_meet_in_a_limit_do_so(seed, given_weights):
    for experts in (normal(3, seed), low_rank(seed)):
        summed = merge("linear", experts, given_weights)
        scaled = merge("task_arithmetic", experts, given_weights, scale=0.6)
        assert_same(merge("cat", experts, given_weights), summed)
        assert_same(scaled, {name: 0.6 * found for name, found in summed.items()})
        assert_same(merge("consensus_ta", experts, given_weights, min_experts=0, scale=0.6), scaled)
        assert_same(merge("knots", experts, given_weights, inner="sum", scale=0.6), scaled)
        assert_same(merge("dare", experts, given_weights, density=1.0), summed)
        assert_same(merge("magnitude_prune", experts, given_weights, density=1.0, scale=0.6), scaled)
        for elect in ("none", "ties"):
            options = {"density": 0.4, "elect": elect, "scale": 1.0}
            della = merge("della", experts, given_weights, epsilon=0.0, normalize=elect == "ties", **options)
            dare = merge("dare", experts, given_weights, normalize=elect == "ties", **options)
            assert all(della[name].tobytes() == dare[name].tobytes() for name in dare)


@pytest.mark.parametrize("variant", ["mergekit", "peft", "release"])
@FEW
@given(seed=seeds, scale=st.sampled_from([1.0, 0.3, -2.0]))
def test_ties_without_trimming_or_conflict_is_the_mean_of_what_is_not_zero(variant, seed, scale):
    experts = [{"w": np.abs(found["w"])} for found in lattice(3, seed)]
    stacked = np.stack([expert["w"] for expert in experts])
    wanted = scale * stacked.sum(axis=0) / np.maximum((stacked != 0).sum(axis=0), 1)
    assert_same(merge("ties", experts, variant=variant, density=1.0, scale=scale), {"w": wanted}, share=1e-12)


@FEW
@given(seed=seeds, given_weights=weights)
def test_equal_statistics_give_the_mean_and_mats_ends_where_regmean_is(seed, given_weights):
    experts = normal(3, seed, shapes={"w": (5, 4)})
    positive = [abs(found) for found in given_weights]
    stacked = np.stack([expert["w"] for expert in experts])
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 20, 4))
    grams = np.einsum("tni,tnj->tij", rows, rows) / 20
    fisher = rng.random((5, 4))

    def solved(method, kind, found, **parameters):
        known = [{kind: {"w": one}} for one in found]
        return arrays.merge(method, experts, weights=positive, digests="abc", statistics=known, parameters=parameters)

    mean = {"w": np.average(stacked, axis=0, weights=positive)}
    assert_same(solved("fisher", "fisher_diag", [fisher] * 3), mean)
    assert_same(solved("regmean", "gram_in", [grams[0]] * 3), mean)
    assert_same(solved("mats", "gram_in", [grams[0]] * 3, start="task_arithmetic"), mean, share=1e-3)
    shrunk = [0.7 * gram + 0.3 * np.diag(gram.diagonal()) for gram in grams]
    left = sum(w * delta @ gram for w, delta, gram in zip(positive, stacked, shrunk, strict=True))
    wanted = {"w": left @ np.linalg.inv(sum(w * gram for w, gram in zip(positive, shrunk, strict=True)))}
    assert_same(solved("regmean", "gram_in", grams, off_diagonal=0.7), wanted)
    assert_same(solved("mats", "gram_in", grams, off_diagonal=0.7, iterations=200), wanted, share=1e-3)


@pytest.mark.parametrize("method", ["regmean", "mats", "fisher"])
@FEW
@given(seed=seeds, given_weights=weights)
def test_statistics_on_factors_are_the_formula_on_deltas(method, seed, given_weights):
    experts = low_rank(seed, names=("w",))
    positive = [abs(found) for found in given_weights]
    assert_same(
        merge(method, experts, positive), merge(method, [dense_of(one) for one in experts], positive), share=1e-4
    )


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "opcm"])
@FEW
@given(
    seed=seeds,
    given_weights=weights,
    shape=st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(0, 4)),
)
def test_the_core_form_is_the_dense_formula_where_the_ranks_fill_the_matrix(method, seed, given_weights, shape):
    count, rank, spare = shape
    side = count * rank
    experts = builders.low_rank(count, seed=seed, shape=(side + spare, side), ranks=(rank,), dtype=np.float64)
    dense = [dense_of(expert) for expert in experts]
    # Directions that nearly vanish are noise in both forms.
    assume(all(np.linalg.cond(sum(found[name] for found in dense)) < 1e3 for name in dense[0]))
    used = given_weights[:count]
    assert_same(merge(method, experts, used), merge(method, dense, used))


def turned(expert, rng):
    """The same deltas split into other factors, (B G, G^-1 A), with G neither diagonal nor orthogonal."""
    found = {}
    for name, one in expert.items():
        gauge = rng.normal(size=(one.rank, one.rank)) + 3 * np.eye(one.rank)
        found[name] = LowRank(np.linalg.solve(gauge, one.A), one.B @ gauge, one.scaling)
    return found


@pytest.mark.parametrize("method", sorted(set(OF_DELTAS) - {"lora_lego"}))
@FEW
@given(seed=seeds, given_weights=weights)
def test_the_gauge_of_an_expert_does_not_matter(method, seed, given_weights):
    """LoRA-LEGO works on rank units, which a general gauge mixes."""
    rng = np.random.default_rng(seed)
    experts = low_rank(seed)
    first = merge(method, experts, given_weights)
    assert_same(merge(method, [turned(expert, rng) for expert in experts], given_weights), first, share=1e-5)


@FEW
@given(seed=seeds)
def test_kinship_does_not_see_the_gauge(seed):
    rng = np.random.default_rng(seed)
    experts = low_rank(seed)
    first, again = (kinship.measure(found) for found in (experts, [turned(expert, rng) for expert in experts]))
    for name in ("cosine", "pearson", "distance", "conflict"):
        np.testing.assert_allclose(getattr(again, name), getattr(first, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", sorted(set(SPECS) - APART - {"lora_lego"}))
@FEW
@given(seed=seeds, given_weights=weights, absent=st.integers(0, 2))
def test_a_missing_module_is_a_lora_of_zeros(method, seed, given_weights, absent):
    """LoRA-LEGO counts the units of an expert, and one of zeros is one more."""
    # The weights of those that have the module may cancel, which some methods refuse.
    assume(abs(sum(given_weights) - given_weights[absent]) > 0.01)
    absent = min(absent, (SPECS[method].most_experts or 3) - 1)
    experts = low_rank(seed)
    short = [dict(expert) for expert in experts]
    given_module = short[absent].pop("q")
    zero = LowRank(given_module.A, 0 * given_module.B, 1.0)
    padded = [{**expert, "q": zero} if i == absent else expert for i, expert in enumerate(experts)]
    # Which other statistics an expert has does not matter for a delta of zero.
    assert_same(merge(method, short, given_weights), merge(method, padded, given_weights))


TWICE = {
    "linear": {"normalize": True},
    "ties": {"density": 0.5},
    "sce": {"select": 0.6},
    "magmax": {},
    "fisher": {},
    "regmean": {},
}


@pytest.mark.parametrize("method", sorted(TWICE))
@FEW
@given(seed=seeds, given_weights=weights)
def test_naming_every_expert_twice_changes_nothing(method, seed, given_weights):
    positive = [abs(found) for found in given_weights]
    # Positions of equal variance are told apart by rounding, which another number of experts changes.
    for experts in (normal(3, seed),) if method == "sce" else (normal(3, seed), lattice(3, seed)):
        once = merge(method, experts, positive, digests="abc", **TWICE[method])
        twice = merge(method, experts * 2, positive * 2, digests="abcabc", **TWICE[method])
        assert_same(twice, once)


@FEW
@given(
    seed=seeds,
    given_weights=weights,
    variant=st.sampled_from(["mergekit", "peft", "release"]),
    block_values=st.sampled_from([1, 70_000, 1 << 20]),
    threads=st.sampled_from([1, 4]),
)
def test_blocks_and_threads_change_no_bit_of_an_election(seed, given_weights, variant, block_values, threads):
    experts = builders.low_rank(3, seed=seed, shape=(150, 512), names=("w",))
    parameters = {"variant": variant, "density": 0.3, "zero_sign": "majority"}
    first, again = (
        arrays.merge("ties", experts, weights=given_weights, digests="abc", parameters=parameters, settings=how)["w"]
        for how in (None, Settings(block_values=block_values, threads=threads))
    )
    assert first.tobytes() == again.tobytes()


@FEW
@given(seed=seeds, given_weights=weights)
def test_order_statistics_that_are_found_in_passes_are_those_of_a_sort(seed, given_weights):
    """PCB and SCE on a tensor too large to gather are as on one that is gathered."""
    experts = normal(3, seed, shapes={"w": (40, 60), "b": (31,)})
    for method, parameters in (("pcb", {"ratio": 0.3}), ("pcb", {"ratio": 0.9}), ("sce", {"select": 0.4})):
        gathered = merge(method, experts, given_weights, **parameters)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(selection, "DIRECT_VALUES", 500)
            assert_same(merge(method, experts, given_weights, **parameters), gathered, share=0)


def test_pcb_clamps_scores_below_zero_where_a_share_of_them_is_kept():
    """Scores of one expert among two, by hand: exp(2 m^2) tanh(x (x + y)), ranked by a plain sort."""
    x, y = np.array([3.0, -1.0, 0.5, -2.0, 1.5, -0.25]), np.array([-4.0, 0.5, 2.0, 1.0, -1.0, 1.0])
    numerator, divisor = np.zeros(6), np.zeros(6)
    for own in (x, y):
        size = np.clip(np.abs(own), np.sort(np.abs(own))[0], np.sort(np.abs(own))[4])
        m = (size - size.min()) / (size.max() - size.min())
        score = np.exp(2 * m**2) * np.tanh(own * (x + y))
        # Seven tenths are kept: the floor is the second lowest score, which is below zero.
        floor = np.sort(score)[1]
        assert floor < 0
        b = (np.maximum(score, floor) - floor) / (score.max() - floor)
        numerator += np.sign(own) * size * b
        divisor += b
    found = merge("pcb", [{"w": x[None]}, {"w": y[None]}], ratio=0.7)["w"][0]
    np.testing.assert_allclose(found, numerator / np.maximum(divisor, 1e-12), rtol=1e-12)


@FEW
@given(seed=seeds)
def test_della_ranks_equal_magnitudes_by_lower_index(seed):
    rows = np.random.default_rng(seed).integers(-3, 4, size=(5, 40)) / 4
    parameters = della.SPEC.parse({"density": 0.5, "epsilon": 0.2})
    wanted = np.empty(rows.shape)
    for row, probabilities in zip(rows, wanted, strict=True):
        order = sorted(range(40), key=lambda place, row=row: (abs(row[place]), place))
        probabilities[order] = 0.3 + np.arange(40) * 0.4 / 39
    for dtype in (np.float32, np.float64):
        np.testing.assert_allclose(della.keep_probability(rows.astype(dtype), parameters), wanted, rtol=1e-12)
