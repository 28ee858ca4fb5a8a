"""Which values are kept and which tensors are compressed, worked by hand."""

import numpy as np
import pytest

from moerge.compression import selection


def kept(values, density):
    return selection.keep_largest(np.array(values, np.float32), density).tolist()


@pytest.mark.parametrize(
    ("values", "density", "expected"),
    [
        ([1, -3, 3, 2, -3, 0], 1 / 3, [1, 2]),  # Three tie for two places: the lower indices win.
        ([1, -3, 3, 2, -3, 0], 0.5, [1, 2, 4]),
        ([1, -3, 3, 2, -3, 0], 4 / 6, [1, 2, 3, 4]),
        ([1, -3, 3, 2, -3, 0], 1, [0, 1, 2, 3, 4]),  # A zero is never kept.
        ([4, 5, 6], 0.5, [1, 2]),  # 1.5 rounds up to 2.
        ([4, 5, 6, 7, 8], 0.3, [3, 4]),  # 1.5 rounds up to 2.
        ([4, 5, 6, 7], 0.3, [3]),  # 1.2 rounds down to 1.
        ([4, -9, 6], 0.01, [1]),  # At least one.
        ([0, 0, 5, 0], 0.75, [2]),
        ([0, 0, 0], 0.5, []),
        ([], 0.5, []),
        ([7], 1, [0]),
    ],
)
def test_exactly_the_largest_are_kept(values, density, expected):
    assert kept(values, density) == expected


def test_rows_come_before_columns_in_the_order_of_ties():
    values = np.array([[1, 2], [2, 2]], np.float32)
    assert selection.keep_largest(values, 0.5).tolist() == [1, 2]


def test_the_published_rule_keeps_all_ties_and_no_zeros():
    values = np.array([1, -3, 3, 2, -3, 0], np.float32)
    assert selection.keep_from(values, 3).tolist() == [1, 2, 4]
    assert selection.keep_from(values, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_the_nth_smallest_is_that_of_a_sorted_list(seed):
    rng = np.random.default_rng(seed)
    blocks = [rng.normal(0, 10.0 ** (5 * seed - 8), size).astype(np.float32) for size in (1, 100, 37)]
    blocks.append(np.array([0, -0.0, 1e-45, 3e38, blocks[0][0]], np.float32))
    together = np.sort(np.abs(np.concatenate(blocks)))
    for rank in (1, 2, 3, 4, 60, 142, together.size):
        assert selection.nth_smallest(lambda: blocks, rank) == together[rank - 1]


def test_spread_over_blocks_is_spread_over_all():
    rng = np.random.default_rng(3)
    blocks = [rng.normal(mean, 2, size).astype(np.float32) for mean, size in ((5, 7), (-1, 300), (0, 1))]
    count, mean, squares = selection.spread([*blocks, np.empty(0, np.float32)])
    everything = np.concatenate(blocks).astype(np.float64)
    assert count == 308
    assert mean == pytest.approx(everything.mean())
    assert np.sqrt(squares / 307) == pytest.approx(everything.std(ddof=1))


@pytest.mark.parametrize(
    ("parameters", "density"),
    [(None, 0.2), (22_000_000, 0.2), (999_999_999, 0.2), (10**9, 0.1), (7 * 10**9, 0.1), (13 * 10**9 - 1, 0.1),
     (13 * 10**9, 0.05), (70 * 10**9, 0.05)],
)  # fmt: skip
def test_larger_bases_need_fewer_values(parameters, density):
    assert selection.density_for(parameters) == density


def test_lora_factors_are_told_by_their_names():
    names = ["m.q.lora_A.weight", "m.q.lora_B.weight", "m.q.lora_B.bias", "m.q.lora_magnitude_vector", "m.k.lora_A.weight",
             "e.lora_embedding_A", "e.lora_embedding_B", "m.classifier.weight", "m.ia3_l", "m.lora_A.weight.x"]  # fmt: skip
    assert selection.factors(names) == {
        "m.q.lora_A.weight": "m.q.lora_B.weight",
        "m.q.lora_B.weight": "m.q.lora_A.weight",
        "m.k.lora_A.weight": None,
        "e.lora_embedding_A": "e.lora_embedding_B",
        "e.lora_embedding_B": "e.lora_embedding_A",
    }
    assert selection.is_first("m.q.lora_A.weight")
    assert not selection.is_first("m.q.lora_B.weight")
    assert selection.module_of("m.q.lora_B.weight") == "m.q"
    assert selection.module_of("e.lora_embedding_A") == "e"
