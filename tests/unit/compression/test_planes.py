"""Position and sign planes, worked by hand."""

import zlib

import numpy as np
import pytest

from moerge.compression import planes


def painted():
    found = []
    return found, lambda positions, done: found.append((done, positions.tolist()))


def chunks(*parts):
    return [np.array(part, np.uint8) for part in parts]


def indices(*values):
    return np.array(values, np.int64)


def test_a_gap_counts_the_values_skipped_before_a_kept_one():
    assert planes.pack(indices(0, 3, 4), 10, planes.GAP8).tolist() == [0, 2, 0]


def test_a_gap_of_255_and_more_is_escapes_and_a_rest():
    # 254 skipped: one byte. 255 skipped: an escape and 0. 256: an escape and 1. 510: two escapes and 0.
    assert planes.pack(indices(254), 2000, planes.GAP8).tolist() == [254]
    assert planes.pack(indices(255), 2000, planes.GAP8).tolist() == [255, 0]
    assert planes.pack(indices(0, 257), 2000, planes.GAP8).tolist() == [0, 255, 1]
    assert planes.pack(indices(7, 518, 520), 2000, planes.GAP8).tolist() == [7, 255, 255, 0, 1]


def test_a_mask_has_its_lowest_bit_first():
    assert planes.pack(indices(1, 2, 9), 10, planes.MASK).tolist() == [0b00000110, 0b00000010]


def test_signs_have_their_lowest_bit_first_and_a_one_for_negative():
    assert planes.pack_signs(np.array([True, False, True] + [False] * 5 + [True])).tolist() == [0b101, 0b1]


@pytest.mark.parametrize(("kept", "coding"), [(299, planes.GAP8), (300, planes.MASK), (0, planes.GAP8)])
def test_gaps_are_used_below_a_density_of_three_tenths(kept, coding):
    assert planes.coding_for(kept, 1000) == coding


def test_gaps_are_walked_across_chunks():
    found, paint = painted()
    planes.walk_gaps(chunks([0, 2, 255], [255, 1, 0]), size=520, kept=4, paint=paint, where="x")
    assert found == [(0, [0, 3]), (2, [515, 516])]


def test_a_mask_is_walked_across_chunks():
    found, paint = painted()
    planes.walk_mask(chunks([0b110], [0b10]), size=10, kept=3, paint=paint, where="x")
    assert found == [(0, [1, 2]), (2, [9])]


def test_planes_longer_than_a_window_keep_their_place():
    rng = np.random.default_rng(1)
    size = 3_000_000
    for density, coding in ((0.2, planes.GAP8), (0.5, planes.MASK), (0.001, planes.GAP8)):
        kept = np.flatnonzero(rng.random(size) < density)
        plane = planes.pack(kept, size, coding)
        parts = [plane[start : start + planes.PIECE_BYTES] for start in range(0, plane.size, planes.PIECE_BYTES)]
        seen = []
        walk = planes.walk_gaps if coding == planes.GAP8 else planes.walk_mask
        walk(
            parts,
            size=size,
            kept=kept.size,
            where="x",
            paint=lambda positions, done, to=seen: to.append(positions.copy()),
        )
        np.testing.assert_array_equal(np.concatenate(seen), kept)


def test_a_piece_that_does_not_shrink_is_stored():
    noise = np.random.default_rng(0).bytes(1000)
    assert planes.deflate(noise) == noise
    assert planes.deflate(b"") == b""
    small = planes.deflate(bytes(1000))
    assert len(small) < 200
    assert zlib.decompress(small, -15) == bytes(1000)
    assert planes.inflate(small, 1000, where="x") == bytes(1000)
    assert planes.inflate(noise, 1000, where="x") == noise
