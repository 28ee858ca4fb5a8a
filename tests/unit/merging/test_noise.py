"""Noise depends on its key and on nothing else."""

import numpy as np
import pytest

from moerge.merging import noise

KEY = noise.key(7, "digest", "layer.weight")


def test_the_bits_of_a_key_never_change():
    assert noise.stream(KEY, 0, 4).tolist() == PINNED


PINNED = [4382983, 11337977, 6780027, 6253421]


@pytest.mark.parametrize(("offset", "count"), [(0, 100), (1, 1), (7, 9), (8, 8), (63, 2), (12, 0)])
def test_any_stretch_is_a_stretch_of_the_whole(offset, count):
    whole = noise.stream(KEY, 0, 200)
    np.testing.assert_array_equal(noise.stream(KEY, offset, count), whole[offset : offset + count])


def test_far_stretches_can_be_made_alone():
    assert noise.stream(KEY, 10**12, 3).tolist() == noise.stream(KEY, 10**12 - 5, 8)[5:].tolist()


def test_keys_differ_by_seed_expert_and_tensor():
    keys = {noise.key(seed, digest, name) for seed in (1, 2) for digest in ("a", "b") for name in ("a", "b")}
    assert len(keys) == 8
    assert noise.key(1, "ab", "c") != noise.key(1, "a", "bc")


def test_bits_are_uniform_and_streams_are_uncorrelated():
    first = noise.stream(KEY, 0, 100_000) / noise.STEPS
    other = noise.stream(noise.key(7, "digest", "layer.bias"), 0, 100_000) / noise.STEPS
    assert first.min() >= 0
    assert first.max() < 1
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(100_000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / np.sqrt(100_000)


def test_keeping_never_at_zero_and_always_at_one():
    bits = np.array([0, 1, noise.STEPS - 1], np.uint32)
    assert not noise.keep(bits, 0.0).any()
    assert noise.keep(bits, 1.0).all()
    assert noise.keep(bits, np.array([0.5, 1e-9, 1.0])).tolist() == [True, False, True]
    np.testing.assert_array_equal(noise.keep(bits, 0.3), noise.keep(bits, np.full(3, 0.3)))


def test_signs_are_plus_or_minus_one_in_equal_number():
    signs = noise.signs(KEY, (200, 50))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.05
