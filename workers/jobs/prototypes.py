"""Prototypes: what routing can tell from the weights of a revision alone, computed from the file that is downloaded."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from moerge.routing import fingerprints as measures
from moerge.routing import prototypes
from moerge.routing.prototypes import Deltas
from moerge.tensors import adapters
from moerge.tensors.kind import Dense, LowRank
from registry import selectors, storage
from registry.checks import files
from registry.models import Revision
from registry.services import blobs, fingerprints
from workers.runner import NotApplicable, Work

# A row stays small; whoever wants every module of a large adapter computes it from the file.
MOST_MODULES_TOLD = 500


def run(work: Work) -> dict[str, Any]:
    """Prototypes, sketch and spectra of one revision. A second run finds the same."""
    assert work.lease.revision_id is not None
    revision = Revision.objects.get(pk=work.lease.revision_id)
    with ExitStack() as opened:
        deltas, source = open_revision(revision, opened)
        told = _Told(deltas.modules, work)
        found = prototypes.of_deltas(told) if not deltas.reason else prototypes.Prototypes({}, reason=deltas.reason)
        print_ = measures.of_deltas(told)
        scalings = deltas.adapter.facts.scalings.values() if deltas.adapter else ()
        facts = {
            "norm": print_.norm,
            "modules": {name: asdict(one) for name, one in list(print_.modules.items())[:MOST_MODULES_TOLD]},
            "module_count": len(deltas.modules),
            "prototype_count": len(found.modules),
            "approximate": deltas.is_approximate,
            "reason": found.reason,
            "scale": Counter(scalings).most_common(1)[0][0] if scalings else 0.0,
        }
    data = prototypes.write(found, source=source) if found.modules else None
    fingerprints.record(
        revision=revision,
        source=source,
        sketch=print_.sketch,
        staged=blobs.stage_bytes(data) if data else None,
        facts=facts,
    )
    if not found.modules:
        raise NotApplicable(found.reason)
    return {"modules": len(found.modules), "norm": print_.norm, "source": source}


def open_revision(revision: Revision, opened: ExitStack) -> tuple[Deltas, str]:
    """The deltas of a revision, open for as long as `opened` lasts, and the SHA-256 of its weights."""
    kept = storage.current()
    with kept.open(selectors.file(revision, files.CONFIG).blob_id) as file:
        config = adapters.parse_config(file.read())
    weights = selectors.file(revision, files.WEIGHTS).blob_id
    return prototypes.open_deltas(config, opened.enter_context(kept.as_path(weights))), weights


class _Told(Mapping[str, LowRank | Dense]):
    """Deltas that are read twice; every reading is told, and stops the job when it is cancelled."""

    def __init__(self, deltas: Mapping[str, LowRank | Dense], work: Work) -> None:
        self._deltas, self._work, self._done = deltas, work, 0

    def __getitem__(self, name: str) -> LowRank | Dense:
        self._done += 1
        self._work.progress(min(0.99, self._done / (2 * len(self._deltas))), "Reading the weights")
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)
