"""Merge deltas that are plain arrays or factors in memory: what `run` does for adapters on disk."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moerge import merging
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import engine, factors
from moerge.merging.base import Parameters, Spec, nearest
from moerge.merging.engine import Settings
from moerge.merging.exclusive import Kept, Split
from moerge.merging.sources import Delta, Given, Source
from moerge.merging.statistics import Statistics


def merge(
    method: str,
    experts: Sequence[Mapping[str, Given]],
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    digests: Sequence[str] | None = None,
    rank: int | None = None,
    statistics: Sequence[Statistics] | None = None,
    settings: Settings | None = None,
) -> dict[str, Delta]:
    """Merged delta per tensor name, in the experts' dtype: factors where the result is exactly low rank.

    With a `rank` every matrix comes as factors of at most that rank.

    `experts` are deltas by tensor name: arrays, or LowRank records with A, B and scaling. `weights` default to 1 each.
    `digests` name the experts where noise and order are concerned and default to a hash of their values.
    `statistics` are, per expert, what a method of group 2 needs: kind -> tensor name -> values, as
    moerge.merging.statistics tells. Raises RecipeInvalid and ExpertsIncompatible.
    """
    spec, sources, checked = _parsed(
        method, experts, weights=weights, parameters=parameters, digests=digests, statistics=statistics
    )
    merged = dict(engine.merge(spec, sources, checked, seed=seed, settings=settings))
    if rank is None:
        return merged
    with engine.one_blas_thread():
        return {
            name: factors.fit(delta, rank, name=name).factors if len(delta.shape) == 2 else delta
            for name, delta in merged.items()
        }


def split(
    method: str,
    experts: Sequence[Mapping[str, Given]],
    *,
    parameters: Mapping[str, Any] | None = None,
    digests: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Split:
    """The shared part and the exclusive parts of experts, by a method that has them; `exclusive.apply` puts them back.

    Raises RecipeInvalid and ExpertsIncompatible.
    """
    spec, sources, checked = _parsed(
        method, experts, weights=None, parameters=parameters, digests=digests, statistics=None
    )
    order = sorted(range(len(sources)), key=lambda place: sources[place].digest)
    found = engine.split(spec, [sources[place] for place in order], checked, settings=settings)
    places = {place: position for position, place in enumerate(order)}

    def exclusive(name: str, expert: int) -> Kept:
        with engine.one_blas_thread():
            return found.exclusive(name, places[expert])

    return Split(found.names, found.shared, exclusive)


def _parsed(
    method: str,
    experts: Sequence[Mapping[str, Given]],
    *,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any] | None,
    digests: Sequence[str] | None,
    statistics: Sequence[Statistics] | None,
) -> tuple[Spec, list[Source], Parameters]:
    """What was asked for, checked."""
    spec = merging.catalogue().get(method)
    if spec is None:
        raise RecipeInvalid(
            f"There is no merge method {method!r}.",
            pointer="/method",
            met=method,
            wanted="one of " + ", ".join(merging.catalogue()),
            remedy=nearest(method, list(merging.catalogue())),
        )
    weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    digests = [digest(expert) for expert in experts] if digests is None else list(digests)
    known: list[Statistics] = [{}] * len(experts) if statistics is None else list(statistics)
    if not len(weights) == len(digests) == len(known) == len(experts):
        raise RecipeInvalid(
            f"There are {len(weights)} weights for {len(experts)} experts.",
            pointer="/experts",
            met=len(weights),
            wanted=len(experts),
            remedy="Give one weight per expert.",
        )
    checked = spec.parse(parameters or {})
    spec.check_weights(weights, checked)
    for name, expert in zip(digests, experts, strict=True):
        _check_finite(name, expert)
    sources = [
        Source(name, weight, tensors, statistics=found)
        for name, weight, tensors, found in zip(digests, weights, experts, known, strict=True)
    ]
    return spec, sources, checked


def _check_finite(expert: str, tensors: Mapping[str, Given]) -> None:
    for name, given in tensors.items():
        parts = [given] if isinstance(given, np.ndarray) else [given.B, given.A]
        if not all(np.isfinite(part).all() for part in parts):
            raise ExpertsIncompatible(
                f"Expert {expert} holds NaN or infinity in {name}.",
                pointer="/experts",
                met="a value that is not finite",
                wanted="finite values",
                remedy="Leave this expert out.",
            )


def digest(tensors: Mapping[str, Given]) -> str:
    """SHA-256 over names, shapes, dtypes and values of one expert's deltas."""
    found = hashlib.sha256()
    for name, given in sorted(tensors.items()):
        scaling = np.float64(getattr(given, "scaling", 1.0))
        for part in [given] if isinstance(given, np.ndarray) else [given.B, given.A, scaling]:
            array = np.ascontiguousarray(part)
            found.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            found.update(array.tobytes())
    return found.hexdigest()
