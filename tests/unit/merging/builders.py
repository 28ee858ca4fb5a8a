"""Small experts for merge tests: deltas with zeros, conflicts and heavy tails, seeded."""

import zlib

import numpy as np

from moerge.tensors.adapters import LowRank

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def values(rng, shape):
    """Heavy-tailed values, a tenth of them zero."""
    found = rng.standard_t(3, size=shape) * 1e-2
    return (found * (rng.random(shape) > 0.1)).astype(np.float32)


def dense(count, *, seed=0, shapes=None):
    """Experts with a matrix and a vector each."""
    rng = np.random.default_rng(seed)
    shapes = shapes or {"layer.weight": (12, 9), "layer.bias": (12,)}
    return [{name: values(rng, shape) for name, shape in shapes.items()} for _ in range(count)]


def low_rank(
    count, *, seed=0, shape=(24, 20), ranks=(3, 2, 4), scalings=(0.5, 2.0, 1.25), names=("q", "v"), dtype=np.float32
):
    """Experts of different ranks and scalings."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: LowRank(
                rng.normal(size=(ranks[i % len(ranks)], shape[1])).astype(dtype),
                rng.normal(size=(shape[0], ranks[i % len(ranks)])).astype(dtype),
                scalings[i % len(scalings)],
            )
            for name in names
        }
        for i in range(count)
    ]


def statistics(experts, digests, needs):
    """What each expert is known by beside its deltas, well conditioned, decided by digest, kind, tensor and shape.

    Every expert has them for every tensor of any expert, as a base model has.
    """
    shapes = {name: tuple(np.shape(delta_of(found))) for expert in experts for name, found in expert.items()}
    shapes = {"*": ()} if needs == ("loss",) else shapes
    return [
        {
            kind: {
                name: _statistic(kind, shape, zlib.crc32(f"{digest} {kind} {name} {shape}".encode()))
                for name, shape in shapes.items()
                if not kind.startswith("gram") or len(shape) == 2
            }
            for kind in needs
        }
        for digest in digests
    ]


def _statistic(kind, shape, seed):
    rng = np.random.default_rng(seed)
    if kind == "fisher_diag":
        return rng.random(shape) * 1e-3
    if kind in {"loss", "coefficients"}:
        return rng.uniform(-0.2, 1.4)
    side = shape[1] if kind == "gram_in" else shape[0]
    rows = rng.normal(size=(4, side))
    return np.eye(side) + rows.T @ rows / (8 * side)


def delta_of(given):
    """A delta as a dense float64 matrix, formed here and not by the code under test."""
    if isinstance(given, np.ndarray):
        return given.astype(np.float64)
    scaling = getattr(given, "scaling", 1.0)
    return scaling * given.B.astype(np.float64) @ given.A.astype(np.float64)


def dense_of(merged):
    return {name: delta_of(found) for name, found in merged.items()}
