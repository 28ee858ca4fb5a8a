"""Kinship: measure how alike experts are, and keep the figures of every pair that was asked for."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from moerge.merging import kinship as measures
from moerge.merging.sources import Given
from moerge.tensors.adapters import Adapter, Dense, Gain
from registry.models import BaseModel, Revision
from registry.services import base_weights, kinship
from registry.services.parents import Parent
from workers.jobs import merge
from workers.runner import Work

FIGURES = ("cosine", "pearson", "distance", "conflict")
# Every delta is read for its shape, for its inner products and for its signs.
READINGS = 3


def run(work: Work) -> dict[str, Any]:
    """Compare the deltas of some revisions, module by module. A second run finds the same figures."""
    ids: dict[str, int] = work.lease.parameters[kinship.REVISIONS]
    digests = sorted(ids)
    rows = Revision.objects.in_bulk(ids.values())
    with ExitStack() as opened:
        base = opened.enter_context(base_weights.open(_base_of(rows))) if _needs_base(rows) else None
        loaded = [merge.load(rows[ids[digest]], opened, base=base) for digest in digests]
        told = _Told(work, READINGS * sum(len(_changes(adapter)) for adapter in loaded))
        found = measures.measure([_Watched(_changes(adapter), told) for adapter in loaded])
    place = {digest: position for position, digest in enumerate(digests)}
    pairs = [(first, second) for first, second in work.lease.parameters[kinship.PAIRS]]
    kinship.record(
        {
            pair: {name: _figure(getattr(found, name)[place[pair[0]], place[pair[1]]]) for name in FIGURES}
            for pair in pairs
        }
    )
    return {"pairs": len(pairs)}


def _figure(value: np.float64) -> float:
    """Six digits: more are not the same on every machine."""
    return float(f"{value:.6g}")


def _changes(adapter: Adapter) -> Mapping[str, Any]:
    """What an adapter changes by module: deltas of the weights, or the gains of IA3."""
    return adapter.gains if adapter.family == "ia3" and not adapter.modules else adapter.modules


def _needs_base(rows: Mapping[int, Revision]) -> bool:
    """Whether some delta is known only with the base's weights, or gains are to be compared with deltas."""
    parents = [Parent(0, "", row) for row in rows.values()]
    return any(parent.blockers for parent in parents) or len({parent.family for parent in parents}) > 1


def _base_of(rows: Mapping[int, Revision]) -> BaseModel:
    base = next(iter(rows.values())).base_model
    assert base is not None, "a revision that is ready has a base"
    return base


class _Told:
    """Counts readings, tells progress, and stops the job when it is cancelled."""

    def __init__(self, work: Work, expected: int) -> None:
        self._work, self._expected, self._done = work, expected, 0

    def step(self) -> None:
        self._done += 1
        self._work.progress(min(0.99, self._done / max(1, self._expected)), "Comparing experts")


class _Watched(Mapping[str, Given]):
    """What an adapter changes; every reading is told."""

    def __init__(self, changes: Mapping[str, Any], told: _Told) -> None:
        self._changes, self._told = changes, told

    def __getitem__(self, name: str) -> Given:
        self._told.step()
        found = self._changes[name]
        return found.values if isinstance(found, Dense | Gain) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the module to see whether it is there.
        return name in self._changes
