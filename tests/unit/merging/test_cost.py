"""Costs told before a merge: without numpy, above what is then taken, and not far above."""

import subprocess
import sys
from math import prod

import pytest

from moerge import merging
from moerge.merging import cost
from moerge.merging.recipe import Output

SQUARE = {"q": (4096, 4096, 16)}


def told(method, experts, **output):
    return cost.estimate(merging.catalogue()[method], Output(**output), experts)


def test_telling_costs_needs_no_numpy():
    code = (
        "import sys; from moerge import merging; from moerge.merging import cost; from moerge.merging.base import Spec\n"
        "from moerge.merging.recipe import Output\n"
        "spec = Spec(name='m', title='M', form='factor', summary='s.', paper='p', when='w')\n"
        "assert cost.estimate(spec, Output(), [{'q': (8, 8, 2)}]).rank == 2\n"
        "assert not {'numpy', 'torch', 'django'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("method", "experts", "output", "rank"),
    [
        ("linear", [SQUARE] * 8, {}, 128), ("ties", [SQUARE] * 8, {}, 64), ("svd", [SQUARE] * 8, {}, 16),
        ("linear", [{"q": (20, 300, 16)}] * 8, {}, 20), ("ties", [SQUARE] * 2, {}, 32),
        ("linear", [SQUARE] * 8, {"rank": 5}, 5), ("linear", [SQUARE] * 8, {"energy": 0.9}, 128),
        ("ties", [SQUARE] * 8, {"energy": 0.9}, cost.HIGHEST_ENERGY_RANK),
        ("ties", [{"q": (96, 400, 16)}] * 8, {"energy": 0.9}, 96),
        # One delta that is not low rank makes the sum dense.
        ("linear", [SQUARE, {"q": (4096, 4096, 0)}], {}, 64),
        ("linear", [SQUARE] * 8, {"kind": "delta"}, None), ("ties", [SQUARE] * 8, {"kind": "full"}, None),
    ],
)  # fmt: skip
def test_the_rank_follows_from_shapes_and_what_is_asked_for(method, experts, output, rank):
    assert told(method, experts, **output).rank == rank


def test_bytes_written_count_factors_or_values_in_their_dtype():
    experts = [{"q": (300, 200, 4), "v": (100, 200, 4)}] * 2
    heads = told("linear", experts).written_bytes - 4 * 8 * (500 + 300)
    assert 0 < heads < 5000
    assert told("linear", experts, dtype="bfloat16").written_bytes - heads == 2 * 8 * (500 + 300)
    values = 300 * 200 + 100 * 200
    assert told("linear", experts, kind="delta").written_bytes - heads == 4 * values
    assert told("linear", experts, kind="ternary", density=0.1).written_bytes < values / 4 + 5000


def test_a_dense_method_costs_more_than_an_exact_one_and_a_large_model_more_than_a_small_one():
    few, many = [SQUARE] * 2, [{f"q{i}": (4096, 4096, 16) for i in range(224)}] * 8
    for method in ("linear", "ties"):
        assert told(method, few).seconds < told(method, many).seconds
        assert told(method, few).memory_bytes < told(method, many).memory_bytes
    assert told("linear", many).seconds < told("ties", many).seconds / 5


def test_saved_tensors_of_a_large_vocabulary_count():
    head = {"lm_head.weight": (128_000, 4096)}
    spec, output = merging.catalogue()["linear"], Output()
    without = cost.estimate(spec, output, [SQUARE] * 2)
    found = cost.estimate(spec, output, [SQUARE] * 2, saved=[head, head])
    size = 4 * prod(head["lm_head.weight"])
    assert found.written_bytes - without.written_bytes >= size
    assert found.memory_bytes - without.memory_bytes >= 2 * size
