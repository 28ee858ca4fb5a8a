"""The compiled loops give the bits of the numpy code, and are taken only where they are worth it or asked for."""

import numpy as np
import pytest

from moerge.merging import arrays, compiled, selection
from moerge.merging.engine import Settings
from moerge.tensors.adapters import LowRank
from tests.unit.merging import builders

pytest.importorskip("numba")

WEIGHTS = [0.5, 1.0, -0.25, 2.0]
VARIANTS = [
    {},
    {"normalize": False, "scale": -0.7},
    {"variant": "peft", "density": 0.3},
    {"variant": "release", "elect": "frequency", "scale": 0.4},
    {"variant": "peft", "zero_sign": "majority", "aggregate": "sum", "elect": "frequency"},
    {"aggregate": "max", "scope": "global", "scale": -1.5},
    {"variant": "peft", "aggregate": "max", "zero_sign": "majority", "density": 0.9},
]


def experts_of(dtype):
    """Equal magnitudes at the cut, votes that cancel, a tensor that one expert lacks, 3 chunks of one block."""
    experts = [
        {name: found.astype(dtype) for name, found in expert.items()}
        for expert in builders.dense(4, seed=3, shapes={"w": (70, 90), "b": (50,)})
    ]
    experts[0]["w"] = np.round(experts[0]["w"] * 50) / 50
    experts[3]["w"] = -experts[0]["w"]
    del experts[1]["b"]
    return experts


def both_ways(method, experts, **options):
    return [
        arrays.merge(method, experts, digests=list("abcd")[: len(experts)], settings=Settings(compiled=way), **options)
        for way in (False, True)
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_has_the_same_bits_compiled_or_not(dtype, monkeypatch):
    monkeypatch.setattr(selection, "DIRECT_VALUES", 1000)
    for parameters in VARIANTS:
        plain, fast = both_ways("ties", experts_of(dtype), weights=WEIGHTS, parameters=parameters)
        for name, found in plain.items():
            assert fast[name].dtype == dtype
            assert fast[name].tobytes() == found.tobytes(), (parameters, name)


def test_thresholds_of_low_rank_experts_are_the_same_compiled_or_not(monkeypatch):
    monkeypatch.setattr(selection, "DIRECT_VALUES", 1000)
    experts = builders.low_rank(3, shape=(300, 512), names=("w",))
    for method in ("ties", "magnitude_prune", "breadcrumbs"):
        plain, fast = both_ways(method, experts, weights=[0.5, 1.0, -0.25])
        assert fast["w"].tobytes() == plain["w"].tobytes(), method


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_values_between_two_bounds_are_gathered_with_their_places(size):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    places = np.full(size + 1, -1)
    low, high = np.float32(0.4), np.float32(1.1)
    over, found = compiled.kernels(0, wanted=True).gather(values, low, high, places)
    magnitudes = np.abs(values)
    assert over == (magnitudes > high).sum()
    np.testing.assert_array_equal(places[:found], np.flatnonzero((magnitudes >= low) & (magnitudes <= high)))


def test_a_compiled_ties_is_that_of_the_paper():
    """Experts (3, -2, 0.1) and (-1, -4, 0.2) at density 2/3: signs +, -, and nothing; 3, and -3 as the mean."""
    experts = [{"w": np.array([[3.0, -2.0, 0.1]])}, {"w": np.array([[-1.0, -4.0, 0.2]])}]
    _, fast = both_ways("ties", experts, parameters={"density": 0.67})
    np.testing.assert_array_equal(fast["w"], [[3.0, -3.0, 0.0]])


def test_a_small_merge_is_not_worth_loading_the_loops_and_a_large_one_is():
    assert compiled.kernels(compiled.WORTH_IT - 1) is None
    assert compiled.kernels(compiled.WORTH_IT) is not None
    assert compiled.kernels(compiled.WORTH_IT, wanted=False) is None


def test_without_numba_there_are_no_loops_and_the_same_result(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _name: None)
    compiled._compiled.cache_clear()
    try:
        plain, same = both_ways("ties", [{"w": LowRank(np.ones((1, 3)), np.ones((2, 1)), 1.0)}])
        assert compiled.kernels(compiled.WORTH_IT) is None
    finally:
        compiled._compiled.cache_clear()
    assert same["w"].tobytes() == plain["w"].tobytes()


def test_machine_code_that_cannot_be_kept_is_compiled_anew(monkeypatch):
    numba = compiled.importlib.import_module("numba")
    real = numba.njit

    def without_a_folder(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'gather': no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    compiled._compiled.cache_clear()
    try:
        assert compiled.kernels(0, wanted=True).gather is not None
    finally:
        compiled._compiled.cache_clear()
