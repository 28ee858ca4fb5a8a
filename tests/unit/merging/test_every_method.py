"""What holds for every merge method that is found, and one worked case for each."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from moerge import merging
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import arrays
from moerge.merging.base import Spec
from moerge.merging.engine import Settings
from moerge.merging.sources import Factors
from moerge.merging.statistics import Gram
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import LETTERS, dense_of

SPECS = merging.catalogue()
METHODS = sorted(SPECS)
RANDOM = [name for name in METHODS if SPECS[name].is_random]
UNORDERED = [name for name in METHODS if not SPECS[name].is_ordered]
CASES = {
    file.stem: tomllib.loads(file.read_text())["case"] for file in (Path(__file__).parent / "cases").glob("*.toml")
}
# tanh in PCB and the norms of single experts make the size of deltas count.
NOT_HOMOGENEOUS = {"pcb"}
# What makes the expectation of a random method the sum of deltas.
PLAIN = {
    "dare": {"density": 0.3},
    "peft_dare_linear": {"density": 0.3},
    "peft_dare_ties": {"density": 0.3},
    "knots": {"inner": "dare", "density": 0.3},
    "della": {"density": 0.5, "epsilon": 0.2, "elect": "none", "normalize": False, "scale": 1.0},
}

# An election is not linear, so what it expects is not the sum.
BIASED = {"peft_dare_ties"}
# These merge A and B apart from each other, which takes equal ranks and sees how a delta is split into factors.
APART = {name for name in METHODS if name.startswith("peft_")}
OF_DELTAS = [name for name in METHODS if name not in APART]


def given(value):
    if isinstance(value, dict):
        return LowRank(np.array(value["A"]), np.array(value["B"]), value["scaling"])
    return np.array(value)


def known(kinds):
    """Statistics of one expert in a case: a matrix, rows and columns of a Fisher, or the parts of a Gram."""
    return {kind: {name: statistic(found) for name, found in tensors.items()} for kind, tensors in kinds.items()}


def statistic(value):
    if isinstance(value, dict) and "rest" in value:
        return Gram(*(np.array(value[part]) for part in ("vectors", "values", "rest")))
    if isinstance(value, dict):
        return Factors(np.array(value["rows"])[:, None], np.array(value["columns"])[None])
    return np.array(value)


def low_rank(method, count=3, **options):
    """Experts of unequal ranks wherever a method takes them."""
    return builders.low_rank(count, **options, **({"ranks": (3,)} if method in APART else {}))


def merge(method, experts, **options):
    """A method for few experts gets the first ones."""
    most = SPECS[method].most_experts
    experts = experts[:most]
    options.setdefault("digests", LETTERS[: len(experts)])
    options |= {name: options[name][:most] for name in ("weights", "digests") if name in options}
    if SPECS[method].needs:
        options.setdefault("statistics", builders.statistics(experts, options["digests"], SPECS[method].needs))
    return arrays.merge(method, experts, **options)


@pytest.mark.parametrize(("method", "number"), [(name, i) for name in sorted(CASES) for i in range(len(CASES[name]))])
def test_a_case_worked_by_hand_is_matched(method, number):
    case = CASES[method][number]
    experts = [{name: given(value) for name, value in expert.items()} for expert in case["experts"]]
    merged = merge(
        method,
        experts,
        weights=case["weights"],
        parameters=case.get("parameters"),
        seed=case.get("seed", 0),
        rank=case.get("rank"),
        **({"statistics": [known(found) for found in case["statistics"]]} if "statistics" in case else {}),
    )
    found = dense_of(merged)
    assert found.keys() == case["expected"].keys()
    for name, expected in case["expected"].items():
        np.testing.assert_allclose(found[name], np.array(expected), rtol=1e-6, atol=1e-7, err_msg=name)


def test_every_method_has_a_case_with_unequal_weights_and_parameters_that_are_not_defaults():
    assert sorted(CASES) == METHODS
    for name, cases in CASES.items():
        assert any(len(set(case["weights"])) > 1 for case in cases), name
        settings = [item for item in SPECS[name].parameters if item.name != "missing"]
        if settings:
            assert any(
                case.get("parameters", {}).get(item.name, item.default) != item.default
                for case in cases
                for item in settings
            ), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 3, 64, 101])
def test_shapes_and_dtypes_are_kept_and_values_are_finite_at_any_size(method, size):
    shapes = {"vector": (size,), "matrix": (size, 7), "wide": (2, size)}
    for dtype in (np.float32, np.float64):
        experts = [
            {name: found.astype(dtype) for name, found in expert.items()}
            for expert in builders.dense(3, seed=size, shapes=shapes)
        ]
        merged = merge(method, experts, weights=[0.5, 1.0, -0.25])
        assert {name: found.shape for name, found in merged.items()} == shapes
        assert all(found.dtype == dtype and np.isfinite(found).all() for found in merged.values())


@pytest.mark.parametrize("method", OF_DELTAS)
def test_low_rank_experts_merge_as_their_dense_deltas_do_or_by_their_cores(method):
    experts = builders.low_rank(3, dtype=np.float64)[: SPECS[method].most_experts]
    merged = dense_of(merge(method, experts, weights=[0.5, 1.0, -0.25], seed=3))
    if SPECS[method].form == "core":
        whole = min(24, 20)
        assert all(np.linalg.matrix_rank(found, tol=1e-4) <= 9 < whole for found in merged.values())
        return
    if method == "lora_lego":
        # A dense matrix has no rank units.
        assert all(np.linalg.matrix_rank(found, tol=1e-4) == 4 for found in merged.values())
        return
    dense = [{name: found.scaling * (found.B @ found.A) for name, found in expert.items()} for expert in experts]
    wanted = dense_of(merge(method, dense, weights=[0.5, 1.0, -0.25], seed=3))
    for name, found in merged.items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    experts = builders.dense(3)
    first, again = (merge(method, experts, weights=[0.5, 1.0, -0.25], seed=7) for _ in range(2))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


@pytest.mark.parametrize("method", RANDOM)
def test_another_seed_expert_or_tensor_gives_other_noise(method):
    expert = {"w": np.ones(200, np.float32), "v": np.ones(200, np.float32)}
    masks = {
        (seed, digest, name): tuple(merge(method, [expert], parameters=PLAIN[method], seed=seed, digests=[digest])[name] != 0)
        for seed in (1, 2)
        for digest in ("a", "b")
        for name in ("v", "w")
    }  # fmt: skip
    assert len(set(masks.values())) == 8


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_untouched(method):
    for experts in (builders.dense(3), low_rank(method)):
        before = [arrays.digest(expert) for expert in experts]
        merge(method, experts, weights=[0.5, 1.0, -0.25], seed=7)
        assert [arrays.digest(expert) for expert in experts] == before


@pytest.mark.parametrize("method", UNORDERED)
def test_the_order_of_experts_changes_no_bit(method):
    for experts in (builders.dense(3), low_rank(method)):
        # Two weights are equal, so that only the digests tell those experts apart.
        weights, digests = [0.5, 0.5, -0.25], ["x", "y", "z"]
        first = dense_of(merge(method, experts, weights=weights, digests=digests, seed=7))
        for order in ([2, 0, 1], [1, 0, 2]) if SPECS[method].most_experts is None else ([1, 0],):
            shuffled = dense_of(
                merge(
                    method,
                    [experts[i] for i in order],
                    weights=[weights[i] for i in order],
                    digests=[digests[i] for i in order],
                    seed=7,
                )
            )
            assert all(first[name].tobytes() == shuffled[name].tobytes() for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_zero_in_gives_zero_out(method):
    zero = {"w": np.zeros((8, 6), np.float32), "b": np.zeros(5, np.float32)}
    factors = {"w": LowRank(np.ones((2, 6), np.float32), np.zeros((8, 2), np.float32), 1.0)}
    for expert in (zero, factors):
        merged = dense_of(merge(method, [expert, expert, expert], weights=[0.5, 1.0, 2.0], seed=1))
        assert all(not found.any() for found in merged.values())


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_that_is_zero_everywhere_does_no_harm(method):
    experts = builders.dense(2)
    nothing = {name: np.zeros_like(found) for name, found in experts[0].items()}
    merged = merge(method, [*experts, nothing], weights=[0.5, 1.0, 2.0], seed=1)
    assert all(np.isfinite(found).all() for found in merged.values())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in NOT_HOMOGENEOUS])
def test_a_common_factor_and_a_common_sign_go_through(method):
    experts = builders.dense(3, seed=5)
    first = merge(method, experts, weights=[0.5, 1.0, 0.25], seed=7)
    for factor in (4.0, -0.5):
        scaled = [{name: np.float32(factor) * found for name, found in expert.items()} for expert in experts]
        merged = merge(method, scaled, weights=[0.5, 1.0, 0.25], seed=7)
        for name, found in first.items():
            np.testing.assert_allclose(merged[name], np.float32(factor) * found, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_parameter_is_named_with_the_nearest_known_one(method):
    known = SPECS[method].parameters
    wrong = f"{known[0].name}s" if known else "densitys"
    with pytest.raises(RecipeInvalid) as caught:
        merge(method, builders.dense(2), parameters={wrong: 0.5})
    assert caught.value.pointer == f"/parameters/{wrong}"
    assert wrong in caught.value.detail
    if known:
        assert caught.value.remedy == f"Did you mean {known[0].name}?"


@pytest.mark.parametrize(("method", "parameter"), [(m, item) for m in METHODS for item in SPECS[m].parameters])
def test_a_parameter_takes_its_own_kind_and_range_only(method, parameter):
    wrong = ["0.5", [0.5], {}, float("nan"), float("inf"), 10**400]
    if parameter.kind == "choice":
        wrong += [True, 1]
    elif parameter.kind == "flag":
        wrong += [1, 0]
    else:
        wrong += [True, False]
        if parameter.minimum is not None:
            wrong += [parameter.minimum - 1, *([parameter.minimum] if parameter.above else [])]
        if parameter.maximum is not None:
            wrong += [parameter.maximum + 1, *([parameter.maximum] if parameter.below else [])]
    if parameter.default is not None:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(RecipeInvalid) as caught:
            SPECS[method].parse({parameter.name: value})
        assert caught.value.pointer == f"/parameters/{parameter.name}"
        assert caught.value.wanted
        assert caught.value.remedy
    assert SPECS[method].parse({parameter.name: parameter.default})[parameter.name] == parameter.default


@pytest.mark.parametrize("method", METHODS)
def test_experts_of_different_shapes_are_refused_by_name(method):
    with pytest.raises(ExpertsIncompatible, match=r"layer has shape \[3, 4\] in b and \[4, 3\] in a"):
        merge(method, [{"layer": np.ones((4, 3))}, {"layer": np.ones((3, 4))}])


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_too_few_or_not_finite_are_refused(method):
    experts = builders.dense(2)
    with pytest.raises(RecipeInvalid, match="1 weights for 2 experts"):
        merge(method, experts, weights=[1.0])
    with pytest.raises(RecipeInvalid) as caught:
        merge(method, experts, weights=[1.0, float("nan")])
    assert caught.value.pointer == "/experts/1/weight"


@pytest.mark.parametrize("method", [name for name in METHODS if SPECS[name].most_experts is not None])
def test_more_experts_than_a_method_takes_are_refused(method):
    count = SPECS[method].most_experts + 1
    with pytest.raises(RecipeInvalid, match=f"takes at most {count - 1} experts, and here are {count}") as caught:
        arrays.merge(method, builders.dense(count))
    assert caught.value.pointer == "/experts"


@pytest.mark.parametrize("method", METHODS)
def test_no_experts_and_no_tensors_are_refused(method):
    for experts in ([], [{}], [{"w": np.zeros((0, 3))}]):
        with pytest.raises(ExpertsIncompatible):
            merge(method, experts)


@pytest.mark.parametrize("method", [name for name in METHODS if SPECS[name].divides_by_weights])
def test_weights_that_cancel_are_refused_where_the_method_divides_by_their_sum(method):
    experts = builders.dense(2)
    has_choice = "normalize" in [item.name for item in SPECS[method].parameters]
    with pytest.raises(RecipeInvalid, match="sum to 0"):
        merge(method, experts, weights=[1.0, -1.0], parameters={"normalize": True} if has_choice else {})
    if has_choice:
        merge(method, experts, weights=[1.0, -1.0], parameters={"normalize": False})


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_blocks_the_number_of_threads_and_compiled_loops_change_no_bit(method):
    """A matrix of two tiles of the product grid, and of up to three blocks."""
    shape = (300, 512)
    for experts in (
        builders.dense(2, shapes={"w": shape, "b": (70_000,)}),
        low_rank(method, 2, shape=shape, names="w"),
    ):
        first = None
        for block_values, threads in ((1, 1), (1 << 17, 2), (1 << 22, 3)):
            settings = Settings(block_values=block_values, threads=threads, compiled=threads == 3)
            merged = merge(method, experts, weights=[0.5, 1.0], seed=3, settings=settings)
            found = {name: value.tobytes() for name, value in dense_of(merged).items()}
            first = first or found
            assert found == first


@pytest.mark.parametrize("method", [name for name in METHODS if "missing" in [p.name for p in SPECS[name].parameters]])
def test_a_missing_tensor_counts_as_zeros_or_leaves_its_expert_out(method):
    experts = builders.dense(3)
    short = [experts[0], {"layer.weight": experts[1]["layer.weight"]}, experts[2]]
    padded = [experts[0], {**short[1], "layer.bias": np.zeros(12, np.float32)}, experts[2]]
    weights = [0.5, 1.0, 0.75]
    zero = merge(method, short, weights=weights, seed=2)
    whole = merge(method, padded, weights=weights, seed=2)
    assert all(zero[name].tobytes() == whole[name].tobytes() for name in whole)
    if method == "pcb":
        return
    skipped = merge(method, short, weights=weights, seed=2, parameters={"missing": "skip"})
    owners = [0, 2] if SPECS[method].most_experts is None else [0]
    without = merge(
        method,
        [{"layer.bias": experts[i]["layer.bias"]} for i in owners],
        weights=[weights[i] for i in owners],
        seed=2,
        digests=["abc"[i] for i in owners],
    )
    np.testing.assert_array_equal(skipped["layer.bias"], without["layer.bias"])


@pytest.mark.parametrize("method", OF_DELTAS)
def test_the_split_of_a_delta_into_factors_does_not_matter(method):
    """(B G, A) and (B, G A) are the same delta; powers of two make the change of gauge exact."""
    experts = builders.low_rank(3)
    gauge = np.array([0.25, 8.0, 2.0, 0.5], np.float32)
    changed = [
        {
            name: LowRank(found.A / gauge[: len(found.A), None], found.B * gauge[: len(found.A)], found.scaling)
            for name, found in expert.items()
        }
        for expert in experts
    ]
    first = dense_of(merge(method, experts, weights=[0.5, 1.0, -0.25], seed=3))
    again = dense_of(merge(method, changed, weights=[0.5, 1.0, -0.25], seed=3))
    for name, found in first.items():
        np.testing.assert_allclose(again[name], found, rtol=1e-4, atol=2e-5 * np.abs(found).max())


@pytest.mark.parametrize("method", [name for name in RANDOM if name not in BIASED])
def test_a_random_method_is_unbiased_over_two_thousand_seeds(method):
    values = np.array([0.5, -1.0, 2.0, -4.0, 0.25, 3.0], np.float32)
    experts, weights = [{"w": values}, {"w": -2 * values[::-1]}], [1.0, 0.5]
    draws = np.stack(
        [merge(method, experts, weights=weights, parameters=PLAIN[method], seed=seed)["w"] for seed in range(2000)]
    )
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - (values - values[::-1])) < 5 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_card_survives_json_and_says_what_a_form_needs(method):
    spec = SPECS[method]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.title
    assert spec.summary.endswith(".")
    assert spec.paper
    assert all(item.help.endswith(".") for item in spec.parameters)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_expert_and_tensor(bad):
    experts = builders.dense(2)
    experts[1]["layer.weight"][2, 3] = bad
    with pytest.raises(ExpertsIncompatible, match=r"b holds NaN or infinity in layer\.weight"):
        merge("linear", experts)
    factors = builders.low_rank(2)
    factors[0]["q"].A[0, 0] = bad
    with pytest.raises(ExpertsIncompatible, match="a holds NaN or infinity in q"):
        merge("cat", factors)
