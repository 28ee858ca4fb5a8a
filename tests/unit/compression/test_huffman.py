"""What the own deflate writes, zlib reads; it is no larger than zlib's Huffman-only stream but for a few bytes."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.compression import huffman, planes


def back(stream):
    """The bytes of a raw deflate stream that must end exactly where it ends."""
    inflater = zlib.decompressobj(-15)
    data = inflater.decompress(stream)
    assert inflater.eof
    assert not inflater.unused_data
    return data


def of_zlib(piece):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(piece) + packer.flush()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_any_bytes_come_back(piece):
    assert back(huffman.deflate(piece)) == piece


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(0, 5000), st.floats(0.001, 0.999))
def test_gaps_of_any_density_come_back(seed, size, density):
    gaps = np.minimum(np.random.default_rng(seed).geometric(density, size) - 1, 255).astype(np.uint8).tobytes()
    assert back(huffman.deflate(gaps)) == gaps


@pytest.mark.parametrize("order", [1, -1])
def test_codes_longer_than_fifteen_bits_are_avoided(order):
    # Fibonacci counts make the deepest trees: 24 symbols would want codes of 23 bits.
    counts = [1, 1]
    while len(counts) < 24:
        counts.append(counts[-1] + counts[-2])
    piece = b"".join(bytes([symbol]) * count for symbol, count in enumerate(counts[::order]))
    assert back(huffman.deflate(piece)) == piece
    lengths = huffman.code_lengths([*counts, *[0] * 232, 1], 15)
    assert 12 <= max(lengths) <= 15
    assert sum(2.0**-length for length in lengths if length) <= 1
    assert huffman.code_lengths(counts, 40)[:3] == [23, 23, 22]


def test_code_lengths_are_those_of_huffman():
    assert huffman.code_lengths([5, 0, 1, 1, 2], 15) == [1, 0, 3, 3, 2]
    assert huffman.code_lengths([0, 3, 0], 15) == [0, 1, 0]


@pytest.mark.parametrize(("density", "limit"), [(0.05, 0.55), (0.1, 0.7), (0.2, 0.7)])
def test_a_piece_of_gaps_is_nearer_to_its_entropy_than_zlib_brings_it(density, limit):
    rng = np.random.default_rng(5)
    size = int(planes.PIECE_BYTES / density / 1.01)
    plane = planes.pack(np.flatnonzero(rng.random(size) < density), size, planes.GAP8).tobytes()[: planes.PIECE_BYTES]
    ours, theirs = huffman.deflate(plane), of_zlib(plane)
    assert back(ours) == plane
    assert len(ours) < len(theirs)
    counts = np.bincount(np.frombuffer(plane, np.uint8))
    share = counts[counts > 0] / len(plane)
    entropy = -(share * np.log2(share)).sum() * len(plane) / 8
    assert 100 * (len(ours) / entropy - 1) < limit + 0.2


def test_a_small_plane_pays_little_for_its_table():
    rng = np.random.default_rng(6)
    plane = planes.pack(np.flatnonzero(rng.random(660_000) < 0.05), 660_000, planes.GAP8).tobytes()
    assert len(huffman.deflate(plane)) < len(of_zlib(plane)) - 10


def test_what_does_not_shrink_is_stored():
    piece = np.random.default_rng(7).bytes(5000)
    assert planes.deflate(piece) == piece
    assert planes.deflate(bytes(5000)) != bytes(5000)
