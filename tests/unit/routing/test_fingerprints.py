"""Sketches and exact cosines of adapters, against the deltas formed in full."""

import numpy as np
import pytest

from moerge.routing import fingerprints
from moerge.tensors.kind import Dense, LowRank

SHAPES = {f"layer.{n}.{part}": (40, 32) for n in range(4) for part in ("q", "v")}


def adapter(seed, *, rank=4, shapes=SHAPES, scaling=0.5):
    rng = np.random.default_rng(seed)
    return {
        name: LowRank(rng.normal(size=(rank, columns)).astype(np.float32),
                      rng.normal(size=(rows, rank)).astype(np.float32), scaling)
        for name, (rows, columns) in shapes.items()
    }  # fmt: skip


def flat(deltas, shapes=SHAPES):
    """All values of all deltas in one vector, in float64."""
    return np.concatenate([
        deltas[name].scaling * (deltas[name].B.astype(np.float64) @ deltas[name].A).ravel()
        if name in deltas else np.zeros(np.prod(shapes[name])) for name in sorted(shapes)
    ])  # fmt: skip


def between(share, first, second):
    """An adapter on the way from one to another: the factors of both side by side."""
    return {
        name: LowRank(np.concatenate([first[name].A, second[name].A]),
                      np.concatenate([(1 - share) * first[name].B, share * second[name].B], axis=1), 0.5)
        for name in first
    }  # fmt: skip


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def refactored(deltas, *, pad=3):
    """The same deltas from other factors: A -> R A, B -> B R^-1, and zeros up to a higher rank."""
    rng = np.random.default_rng(7)
    found = {}
    for name, delta in deltas.items():
        R = rng.normal(size=(delta.rank, delta.rank)) + 3 * np.eye(delta.rank)
        A = np.concatenate([R @ delta.A, np.zeros((pad, delta.A.shape[1]))])
        B = np.concatenate(
            [delta.B @ np.linalg.inv(R) * delta.scaling / 2, rng.normal(size=(len(delta.B), pad))], axis=1
        )
        found[name] = LowRank(A.astype(np.float32), B.astype(np.float32), 2.0)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_the_exact_cosine_is_that_of_the_whole_deltas(share):
    first = adapter(0)
    second = between(share, first, adapter(1))
    found = fingerprints.compare(first, second)
    x, y = flat(first), flat(second)
    assert found.cosine == pytest.approx(cosine(x, y), abs=1e-6)
    assert found.ratio == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)


def test_a_module_that_one_lacks_counts_as_zero():
    first, second = adapter(0), adapter(0)
    del second["layer.0.q"], first["layer.3.v"]
    found = fingerprints.compare(first, second)
    assert found.cosine == pytest.approx(cosine(flat(first), flat(second)), abs=1e-6)


def test_opposite_deltas_have_cosine_minus_one_and_zero_has_none():
    first = adapter(0)
    opposite = {name: LowRank(one.A, -one.B, 3 * one.scaling) for name, one in first.items()}
    found = fingerprints.compare(first, opposite)
    assert found.cosine == pytest.approx(-1)
    assert found.ratio == pytest.approx(1 / 3)
    nothing = {name: LowRank(one.A, 0 * one.B, 1.0) for name, one in first.items()}
    assert fingerprints.compare(first, nothing) == fingerprints.Likeness(0.0, 0.0)


def test_modules_of_one_name_and_other_shapes_have_nothing_in_common():
    first, second = adapter(0), adapter(0, shapes=dict.fromkeys(SHAPES, (32, 40)))
    assert fingerprints.compare(first, second).cosine == 0


def test_dense_and_factored_deltas_compare():
    first = adapter(0)
    dense = {name: Dense(one.delta()) for name, one in first.items()}
    assert fingerprints.compare(first, dense).cosine == pytest.approx(1, abs=1e-6)
    assert fingerprints.compare(first, dense).ratio == pytest.approx(1, abs=1e-6)
    sketches = [fingerprints.of_deltas(one).sketch for one in (first, dense)]
    np.testing.assert_allclose(*sketches, atol=1e-5)


def test_another_factorisation_at_another_rank_is_the_same_adapter():
    first = adapter(0)
    other = refactored(first)
    found = fingerprints.compare(first, other)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.ratio == pytest.approx(1, abs=1e-5)
    sketches = [fingerprints.of_deltas(one).sketch for one in (first, other)]
    np.testing.assert_allclose(*sketches, atol=1e-5)


def test_the_sketch_is_a_unit_vector_and_does_not_depend_on_the_scale():
    one, other = (fingerprints.of_deltas(adapter(0, scaling=scaling)) for scaling in (0.5, 4.0))
    assert one.sketch.shape == (fingerprints.WIDTH,)
    assert np.linalg.norm(one.sketch) == pytest.approx(1)
    np.testing.assert_allclose(one.sketch, other.sketch, atol=1e-6)
    assert other.norm == pytest.approx(8 * one.norm)


def test_cosines_of_sketches_estimate_cosines_of_deltas():
    first, stranger = adapter(0), adapter(1)
    known = fingerprints.of_deltas(first).sketch
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0):
        other = between(share, first, stranger)
        estimate = float(fingerprints.of_deltas(other).sketch @ known)
        assert estimate == pytest.approx(cosine(flat(first), flat(other)), abs=0.1)


def test_the_sketch_is_the_count_sketch_of_every_value_one_by_one():
    deltas = {**adapter(0, shapes={"m": (6, 5)}, rank=2), **adapter(1, shapes={"n": (4, 7)}, rank=2, scaling=3.0)}
    expected = np.zeros(fingerprints.WIDTH)
    for module, delta in deltas.items():
        (n_rows, n_columns), values = delta.shape, delta.delta().astype(np.float64)
        rows = fingerprints._hashes(f"{module}/out", n_rows)
        columns = fingerprints._hashes(f"{module}/in", n_columns)
        for o in range(n_rows):
            for j in range(n_columns):
                place = (rows[0][o] + columns[0][j]) % fingerprints.WIDTH
                expected[place] += rows[1][o] * columns[1][j] * values[o, j]
    np.testing.assert_allclose(fingerprints.of_deltas(deltas).sketch, expected / np.linalg.norm(expected), atol=1e-6)


def test_modules_of_other_names_are_hashed_otherwise_and_alike_on_every_machine():
    one = adapter(0, shapes={"a": (40, 32)})
    assert abs(fingerprints.of_deltas(one).sketch @ fingerprints.of_deltas({"b": one["a"]}).sketch) < 0.2
    places, signs = fingerprints._hashes("a/out", 6)
    # From `shake_256` of another implementation: openssl dgst -shake256 -xoflen 12.
    assert places.tolist() == [856, 139, 693, 783, 21, 509]
    assert signs.tolist() == [1.0, 1.0, -1.0, -1.0, -1.0, 1.0]


def test_norms_shares_and_effective_ranks_are_told_by_module():
    B = np.eye(6, 2, dtype=np.float32)
    A = np.array([[2, 0, 0], [0, 2, 0]], np.float32)
    deltas = {"even": LowRank(A, B, 0.5), "one": LowRank(A[:1], B[:, :1], 3.0), "zero": LowRank(0 * A, B, 1.0)}
    found = fingerprints.of_deltas(deltas)
    assert found.modules["even"].norm == pytest.approx(2**0.5)
    assert found.modules["even"].share == pytest.approx(0.5)
    assert found.modules["even"].effective_rank == pytest.approx(2)
    assert found.modules["one"].norm == pytest.approx(6)
    assert found.modules["one"].share == pytest.approx(1)
    assert found.modules["one"].effective_rank == pytest.approx(1)
    assert "zero" not in found.modules
    assert found.norm == pytest.approx((2 + 36) ** 0.5)


def test_an_untrained_adapter_has_an_empty_fingerprint():
    found = fingerprints.of_deltas({"zero": LowRank(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32), 1.0)})
    assert found.norm == 0
    assert not found.sketch.any()
