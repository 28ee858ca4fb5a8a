"""Thresholds that stream are those of a full sort, whatever the values and whichever way they are found."""

import numpy as np
import pytest

from moerge.merging import selection
from moerge.merging.sources import Factors, Source, Stream


def pieces_of(values, size=1000):
    def pieces():
        for start in range(0, values.size, size):
            yield start, np.abs(values[start : start + size])

    return pieces


def kept_by_sorting(values, kept):
    order = np.lexsort((np.arange(values.size), -np.abs(values)))
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:kept]] = True
    return mask


def samples():
    rng = np.random.default_rng(0)
    yield "heavy tails", rng.standard_t(2, size=20_000).astype(np.float32)
    yield "float64", rng.normal(size=20_000)
    yield "many equal", rng.integers(-3, 4, size=20_000).astype(np.float32)
    yield "all equal", np.full(5_000, -2.5, np.float32)
    yield "zeros", np.zeros(5_000, np.float32)
    yield "subnormal", (rng.normal(size=5_000) * 1e-40).astype(np.float32)
    yield "huge", (rng.normal(size=5_000) * 1e37).astype(np.float32)
    yield "sorted", np.arange(5_000, dtype=np.float32)


@pytest.mark.parametrize(("name", "values"), list(samples()), ids=[name for name, _ in samples()])
@pytest.mark.parametrize("share", [0.0001, 0.2, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("way", ["direct", "bracket", "digits"])
def test_exactly_the_largest_are_kept_and_equal_ones_by_lower_index(name, values, share, way, monkeypatch):
    kept = max(1, int(share * values.size))
    pieces = pieces_of(values)
    if way == "digits":
        threshold, last = selection._find_by_digits(pieces, kept=kept)
    else:
        if way == "bracket":
            monkeypatch.setattr(selection, "DIRECT_VALUES", 100)
        threshold, last = selection.find(pieces, size=values.size, kept=kept, sample=lambda: values[::7])
    cut = selection.Cut(threshold, last)
    mask = np.concatenate([cut.mask(values[start : start + 777], start) for start in range(0, values.size, 777)])
    np.testing.assert_array_equal(mask, kept_by_sorting(values, kept))


def test_a_sample_that_misleads_costs_time_and_not_the_answer(monkeypatch):
    monkeypatch.setattr(selection, "DIRECT_VALUES", 100)
    values = np.random.default_rng(1).normal(size=20_000).astype(np.float32)
    for sample in (np.full(50, 100.0, np.float32), np.zeros(50, np.float32)):
        threshold, last = selection.find(pieces_of(values), size=values.size, kept=4_000, sample=lambda s=sample: s)
        mask = selection.Cut(threshold, last).mask(values, 0)
        np.testing.assert_array_equal(mask, kept_by_sorting(values, 4_000))


def test_a_good_sample_needs_one_pass(monkeypatch):
    monkeypatch.setattr(selection, "DIRECT_VALUES", 100)
    monkeypatch.setattr(selection, "_find_by_digits", lambda *_args, **_options: pytest.fail("the bracket missed"))
    values = np.random.default_rng(1).normal(size=200_000).astype(np.float32)
    selection.find(pieces_of(values), size=values.size, kept=40_000, sample=lambda: values[::11])


def test_a_product_of_factors_is_cut_as_its_dense_matrix_is(monkeypatch):
    monkeypatch.setattr(selection, "DIRECT_VALUES", 100)
    monkeypatch.setattr(selection, "SAMPLE_VALUES", 5_000)
    rng = np.random.default_rng(2)
    factors = Factors(rng.normal(size=(600, 4)).astype(np.float32), rng.normal(size=(4, 300)).astype(np.float32))
    stream = Stream((Source("a", 1.0, {"w": Product(factors)}),))
    (cut,) = selection.cuts(stream, density=0.3, scope="tensor").values()
    values = np.concatenate([found for _, found in stream.blocks("w", 0)])
    np.testing.assert_array_equal(cut.mask(values, 0), kept_by_sorting(values, 54_000))


class Product:
    """Factors as a LowRank record with scaling 1."""

    def __init__(self, factors):
        self.A, self.B, self.scaling = factors.A, factors.B, 1.0


def test_a_global_cut_ranks_over_all_tensors_in_sorted_name_order():
    tensors = {"b": np.array([5.0, 2.0, 1.0]), "a": np.array([[2.0, 0.5], [3.0, 2.0]])}
    stream = Stream((Source("x", 1.0, tensors),))
    cuts = selection.cuts(stream, density=3 / 7, scope="global")
    kept = {name: cuts[0, name].mask(tensors[name].ravel(), 0) for name in tensors}
    # 5, 3, and the first of three 2s, which lies in a.
    assert kept["a"].tolist() == [True, False, True, False]
    assert kept["b"].tolist() == [True, False, False]


def test_the_density_meant_is_kept_although_binary_falls_short():
    """1 - 0.8 is 0.19999999999999996 and 0.29 * 100 is 28.999999999999996."""
    for size, density, count in (
        (10, 1 - 0.8, 2), (100, 0.29, 29), (100, 0.57, 57), (5, 0.2, 1), (5, 0.39, 1), (5, 0.4, 2), (5, 0.59, 2),
        (5, 1.0, 5), (5, 0.01, 1),
    ):  # fmt: skip
        values = np.arange(1.0, size + 1)
        stream = Stream((Source("x", 1.0, {"w": values}),))
        cuts = selection.cuts(stream, density=density, scope="tensor")
        assert cuts[0, "w"].mask(values, 0).sum() == count, (size, density)
