"""No method stands in for another, and no parameter or weight is taken without effect."""

import numpy as np
import pytest

from moerge import merging
from moerge.merging import arrays
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders
from tests.unit.merging.builders import dense_of

SPECS = merging.catalogue()
APART = {name for name in SPECS if name.startswith("peft_")}
WEIGHTS = [0.5, 1.0, 0.8, -0.3]
NAMES = ("layers.0.q", "layers.5.q", "head")

# Parameters under which a method is far from every limit in which it meets another.
SETTINGS = {
    "adamerging": {"scale": 0.8},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "consensus_ta": {"threshold": 0.7},
    "dare": {"density": 0.6},
    "della": {"density": 0.5, "epsilon": 0.2},
    "iso_c": {"scale": 0.7},
    "iso_cts": {"scale": 0.7, "common": 0.3},
    "knots": {"density": 0.6},
    "layer_swapping": {"layers": "0-2=1; 5=0*0.5+2*0.7; other=3"},
    "linear": {"normalize": True},
    "lm_cocktail": {"temperature": 2.0},
    "lora_lego": {"units": 5},
    "lorahub": {"composition": "release"},
    "magmax": {"scale": 0.6},
    "magnitude_prune": {"density": 0.5},
    # Left to run to its end it is RegMean.
    "mats": {"iterations": 1, "off_diagonal": 0.3, "start": "task_arithmetic"},
    "nuslerp": {"scope": "row"},
    "peft_dare_linear": {"density": 0.7},
    "peft_dare_ties": {"density": 0.7},
    "peft_magnitude_prune": {"density": 0.6},
    "peft_ties": {"density": 0.6},
    "regmean": {"off_diagonal": 0.5},
    "sce": {"select": 0.5},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.5},
    "tsv_m": {"scale": 0.7},
}
# What an optional objective needs besides.
NEEDS = {"mats": ("gram_in", "gram_out")}
# The pairs that may agree, each for its reason.
SAME = {("cat", "svd"): "the same exact sum; svd differs in the rank that is kept"}


def experts(method=""):
    """Four experts of unequal ranks and scalings, with zero rows and columns, whose signs conflict everywhere else.

    Methods that want equal ranks get the same deltas with units of zero.
    """
    made = builders.low_rank(4, seed=2, ranks=(3, 2, 4, 3), scalings=(0.5, 2.0, 1.25, 0.8), names=NAMES)
    for number, expert in enumerate(made):
        for name, found in expert.items():
            A, B = found.A.copy(), found.B.copy()
            A[:, number::7] = 0
            B[2 * number, :] = 0
            if method in APART or method == "lorahub":
                spare = 4 - found.rank
                A, B = np.pad(A, ((0, spare), (0, 0))), np.pad(B, ((0, 0), (0, spare)))
            expert[name] = LowRank(A, B, found.scaling)
    return made


def merged(method, parameters, weights=WEIGHTS):
    most = SPECS[method].most_experts
    given, digests, needs = experts(method)[:most], list("abcd")[:most], SPECS[method].needs
    found = dense_of(
        arrays.merge(
            method,
            given,
            weights=weights[:most],
            parameters=parameters,
            seed=1,
            digests=digests,
            statistics=builders.statistics(given, digests, NEEDS.get(method, needs)) if needs else None,
        )
    )
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def distance(one, other):
    return np.linalg.norm(one - other) / min(np.linalg.norm(one), np.linalg.norm(other))


@pytest.fixture(scope="module")
def results():
    return {method: merged(method, SETTINGS.get(method, {})) for method in sorted(SPECS)}


def test_no_two_methods_agree_but_those_that_are_one(results):
    names = sorted(results)
    same = {
        (one, other)
        for place, one in enumerate(names)
        for other in names[place + 1 :]
        if distance(results[one], results[other]) <= 1e-3
    }
    assert same == set(SAME)


# Another value for each parameter, and what has to be set besides for it to count.
OTHER = {
    ("adamerging", "scale"): (0.5, {}),
    ("breadcrumbs", "scope"): ("row", {}),
    ("dare", "rescale"): ("l1", {}),
    ("della", "elect"): ("none", {}),
    ("della", "rescale"): ("l1", {}),
    ("iso_cts", "common"): (0.9, {}),
    ("knots", "aggregate"): ("sum", {}),
    ("knots", "inner"): ("dare", {}),
    ("layer_swapping", "layers"): ("0-2=2; other=1", {}),
    ("lora_lego", "units"): (4, {}),
    ("lorahub", "composition"): ("delta", {}),
    ("mats", "iterations"): (2, {}),
    ("mats", "start"): ("average", {}),
    ("mats", "start_scale"): (0.7, {}),
    ("nuslerp", "scope"): ("tensor", {}),
    ("peft_ties", "elect"): ("frequency", {}),
    ("slerp", "threshold"): (1e-6, {}),
    ("ties", "normalize"): (False, {}),
    ("ties", "scope"): ("global", {}),
    ("ties", "variant"): ("peft", {}),
    ("twin_merging", "directions"): (1, {"compress": "svd"}),
}
# Without effect on these experts, each for its reason, with the test that shows the effect elsewhere.
SILENT = {
    ("fisher", "floor_by"): "the information here is far above the floor: test_statistics",
    ("karcher", "steps"): "it has converged: test_sphere",
    ("karcher", "tolerance"): "it has converged: test_sphere",
    ("magmax", "tie"): "no two magnitudes are equal but zeros: test_properties",
    ("mediator", "top"): "the same layers conflict most: test_exclusive",
    ("mats", "fallback"): "every matrix has its statistics: test_statistics",
    ("one_bit", "modules"): "no name says attention or feed-forward: test_exclusive",
    ("regmean", "fallback"): "every matrix has its statistics: test_statistics",
    ("magnitude_prune", "min_keep"): "no tensor is so small: the case files",
    ("ties", "min_keep"): "no tensor is so small: the case files",
    ("ties", "zero_sign"): "votes cancel where all are zero alone: test_merging in tests/golden",
}
EVERY = [
    (method, item)
    for method, spec in sorted(SPECS.items())
    for item in spec.parameters
    if item.name != "missing" and (method, item.name) not in SILENT
]


def another(method, item, now):
    """A value that the parameter does not have."""
    if (method, item.name) in OTHER:
        return OTHER[method, item.name]
    if item.kind == "flag":
        return not now, {}
    if item.kind == "choice":
        return next(value for value in item.choices if value != now), {}
    if item.kind == "integer":
        return (now or 1) + 1, {}
    return (0.6 * now if now else 0.37), {}


@pytest.mark.parametrize(("method", "item"), EVERY, ids=[f"{method}-{item.name}" for method, item in EVERY])
def test_a_parameter_changes_what_comes_out(method, item):
    settings = SETTINGS.get(method, {})
    value, besides = another(method, item, settings.get(item.name, item.default))
    first = merged(method, {**settings, **besides})
    assert distance(first, merged(method, {**settings, **besides, item.name: value})) > 1e-6


# The weight of an expert is what evaluation has found, or the place between two experts is a parameter.
UNWEIGHTED = {"layer_swapping", "lm_cocktail", "adamerging", "slerp"}


@pytest.mark.parametrize("method", sorted(set(SPECS) - UNWEIGHTED))
def test_each_weight_changes_what_comes_out_and_stays_with_its_expert(method, results):
    count = len(WEIGHTS[: SPECS[method].most_experts])
    for place in range(count):
        other = [weight + 0.21 * (number == place) for number, weight in enumerate(WEIGHTS)]
        assert distance(results[method], merged(method, SETTINGS.get(method, {}), other)) > 1e-6
    swapped = [WEIGHTS[1], WEIGHTS[0], *WEIGHTS[2:]]
    assert distance(results[method], merged(method, SETTINGS.get(method, {}), swapped)) > 1e-3
