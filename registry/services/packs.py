"""Routing packs: for experts of one base model, what a client needs to route every token among them itself.

What is in a pack is decided from rows, and so is its ETag; only then are files read. An expert that the caller may not
see is answered like one that does not exist.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.conf import settings

from moerge.errors import MoergeError
from moerge.routing import gates, packs, prototypes
from moerge.routing.packs import ARROW, GLIDER, PHATGOOSE, Member, Pack
from moerge.tensors.files import Float32
from registry import selectors, storage
from registry.errors import (
    ExpertNotFound,
    Fault,
    FileNotFound,
    NotReady,
    PackPending,
    PackRefused,
    RequestInvalid,
    TooLarge,
)
from registry.models import BaseModel, Embedding, Expert, File, Fingerprint, Job, Revision, User
from registry.selectors import Repository, Viewer
from registry.services import bases, encoders, encodings, fingerprints, reconstructions, routing

DEFAULT_TOP_K = 8


@dataclass(frozen=True, eq=False)
class _Row:
    """One expert of a pack as its rows tell it; `glider` is the embedding of its instruction or description."""

    name: str
    revision: Revision
    fingerprint: Fingerprint
    gates: File | None
    glider: Embedding | None
    is_private: bool

    @property
    def source(self) -> str:
        """SHA-256 of the weights that the client downloads."""
        return self.fingerprint.source


@dataclass(frozen=True, eq=False)
class Order:
    """A pack that can be made; `etag` names its bytes."""

    base: BaseModel
    rows: tuple[_Row, ...]
    kinds: tuple[str, ...]
    modules: tuple[str, ...]
    encoder: str
    etag: str

    @property
    def is_private(self) -> bool:
        return any(row.is_private for row in self.rows)


def order(
    *,
    viewer: Viewer,
    base_model: str,
    experts: Sequence[str] | None = None,
    query: str | None = None,
    top_k: int = DEFAULT_TOP_K,
    kinds: Sequence[str] = (ARROW,),
    modules: Sequence[str] = (),
) -> Order:
    """What a pack of these experts, or of those that fit a query best, will hold.

    Raises RequestInvalid, BaseUnknown, ExpertNotFound, RevisionNotFound, PackRefused for another base or nothing to
    route by, NotReady, TooLarge, and PackPending while prototypes are being computed.
    """
    base = bases.resolve(base_model, pointer="/base_model")
    kinds = tuple(kind for kind in packs.KINDS if kind in kinds)
    names = _named(viewer, base, experts, query, top_k)
    found = _repositories(names, viewer)
    pinned = [_revision(repository, reference, viewer) for repository, (_, reference) in zip(found, names, strict=True)]
    _check_bases(base, names, pinned)
    _check_states(names, pinned)
    encoder = encoders.active().pk if GLIDER in kinds else ""
    rows = tuple(
        _row(repository, revision, encoder=encoder, kinds=kinds)
        for repository, revision in zip(found, pinned, strict=True)
    )
    _check_kinds(rows, kinds)
    return Order(base, rows, kinds, tuple(sorted(set(modules))), encoder, _etag(base, rows, kinds, modules, encoder))


def build(wanted: Order) -> bytes:
    """The file of a pack; the same order gives the same bytes. Raises TooLarge, RequestInvalid for unknown modules."""
    _check_size(wanted)
    masks: dict[str, Any] = {}
    arrow: Mapping[str, Float32] = {}
    sigmas: Mapping[str, Float32] = {}
    phatgoose: Mapping[str, Float32] = {}
    glider = glider_mask = None
    try:
        if ARROW in wanted.kinds:
            found = [_prototypes(row, wanted.modules) for row in wanted.rows]
            arrow, sigmas, masks[ARROW] = packs.of_prototypes(found)
        if PHATGOOSE in wanted.kinds:
            phatgoose, masks[PHATGOOSE] = packs.stacked([_gates(row, wanted.modules) for row in wanted.rows])
        if GLIDER in wanted.kinds:
            glider, glider_mask = _glider(wanted.rows)
        if wanted.modules and not arrow and not phatgoose and wanted.kinds != (GLIDER,):
            raise _unknown_modules(wanted.modules)
        return packs.write(
            Pack(
                base_model=wanted.base.name, base_revision=wanted.base.revision, encoder=wanted.encoder,
                kinds=wanted.kinds, members=tuple(_member(row) for row in wanted.rows), arrow=arrow,
                arrow_sigma=sigmas, phatgoose=phatgoose, masks=masks, glider_global=glider, glider_mask=glider_mask,
                top_k=min(packs.TOP_K, len(wanted.rows)),
            )
        )  # fmt: skip
    except MoergeError as error:
        raise PackRefused.of(error) from error


# What was asked for


def _named(
    viewer: Viewer, base: BaseModel, experts: Sequence[str] | None, query: str | None, top_k: int
) -> list[tuple[str, str]]:
    """Names and references of the experts that were named, or that fit the query best."""
    limit = settings.HUB_PACK_MAX_EXPERTS
    if (experts is None) == (query is None):
        met = "neither" if query is None else "both"
        raise _wrong("/experts", met, "experts, or a query", "Name the experts or give a query.")
    if query is not None:
        if not 1 <= top_k <= min(limit, routing.MAX_RESULTS):
            raise _wrong("/top_k", top_k, f"1 to {min(limit, routing.MAX_RESULTS)}", "Correct this field.")
        found = routing.route(viewer=viewer, text=query, base_model=base.name, top_k=top_k, min_score=0.0)
        if not found["results"]:
            raise PackRefused(f"No expert of {base.name} was found for the query.",
                              faults=[Fault("/query", "no expert", "one or more", "Name the experts.")])  # fmt: skip
        return [(hit["expert"], hit["revision"]) for hit in found["results"]]
    assert experts is not None
    if not 1 <= len(experts) <= limit:
        raise _wrong("/experts", len(experts), f"1 to {limit} experts", "Name fewer experts.")
    names = [(name, reference or "main") for name, _, reference in (one.partition("@") for one in experts)]
    folded = [(name.casefold(), reference) for name, reference in names]
    for place, one in enumerate(folded):
        if one in folded[:place]:
            raise _wrong(f"/experts/{place}", experts[place], "every expert once", "Leave it out.")
    return names


def _repositories(names: Sequence[tuple[str, str]], viewer: Viewer) -> list[Repository]:
    """The experts of these names that the caller may see, all or none."""
    found: list[Repository] = []
    faults = []
    for place, (name, _) in enumerate(names):
        try:
            found.append(Repository(selectors.expert(name, viewer), None))
        except ExpertNotFound:
            remedy = "Check the name, and whether your key may read it."
            faults.append(Fault(f"/experts/{place}", name[:200], "an expert that you may see", remedy))
    if faults:
        raise ExpertNotFound(f"{len(faults)} experts do not exist, or you may not see them.", faults=faults)
    return found


def _revision(repository: Repository, reference: str, viewer: Viewer) -> Revision:
    """What a reference means; the name of a compressed form is its reconstruction, which is made where it is not there.

    Raises RevisionNotFound, FormPending, FormFailed.
    """
    assert repository.expert is not None
    made = reconstructions.named(repository.expert, reference)
    if made is None:
        return selectors.revision(repository, reference)
    if made.revision is None:
        job = reconstructions.ask(made, user=viewer if isinstance(viewer, User) else None)
        raise encodings.outcome(job)
    return made.revision


def _check_bases(base: BaseModel, names: Sequence[tuple[str, str]], found: Sequence[Revision]) -> None:
    faults = [
        Fault(f"/experts/{place}", row.base_model.name if row.base_model else None, base.name,
              f"Leave {names[place][0]} out.")
        for place, row in enumerate(found)
        if row.base_model_id != base.pk
    ]  # fmt: skip
    if faults:
        strangers = ", ".join(names[int(fault.pointer.rpartition("/")[2])][0] for fault in faults)
        raise PackRefused(f"Not on {base.name}: {strangers}.", faults=faults)


def _check_states(names: Sequence[tuple[str, str]], found: Sequence[Revision]) -> None:
    faults = [
        Fault(f"/experts/{place}", row.state, Revision.State.READY.value, f"Wait, or leave {names[place][0]} out.")
        for place, row in enumerate(found)
        if row.state != Revision.State.READY
    ]
    if faults:
        raise NotReady(f"{len(faults)} experts are not ready.", faults=faults)


def _row(repository: Repository, revision: Revision, *, encoder: str, kinds: Sequence[str]) -> _Row:
    assert repository.expert is not None
    return _Row(
        name=repository.expert.full_name,
        revision=revision,
        fingerprint=_fingerprint(repository.expert, revision),
        gates=_gates_file(revision) if PHATGOOSE in kinds else None,
        glider=_embedding(revision, encoder) if encoder else None,
        is_private=repository.expert.visibility == Expert.Visibility.PRIVATE,
    )


def _fingerprint(expert: Expert, revision: Revision) -> Fingerprint:
    found = fingerprints.obtain(revision)
    if isinstance(found, Fingerprint):
        return found
    if found.state == Job.State.FAILED:
        raise NotReady(
            f"The prototypes of {expert.full_name} could not be computed: {(found.error or {}).get('detail', '')}",
            faults=[Fault("/experts", expert.full_name, "an expert with prototypes", f"Try job {found.pk} again.")],
        )
    raise PackPending(f"The prototypes of {expert.full_name} are being computed.", job_id=found.pk)


def _gates_file(revision: Revision) -> File | None:
    """The gates beside an adapter. A reconstruction has those of its original, whose deltas it comes near."""
    if "gates" not in revision.facts:
        return None
    try:
        return selectors.file(revision, gates.FILE)
    except FileNotFound:
        return None


def _embedding(revision: Revision, encoder: str) -> Embedding | None:
    """What stands for the expert in GLIDER's global half: the vector of its instruction, else of its description."""
    owner = revision.derived_from_id or revision.pk
    kinds = [Embedding.Kind.INSTRUCTION, Embedding.Kind.DESCRIPTION]
    rows = Embedding.objects.filter(revision=owner, encoder=encoder, kind__in=kinds, position=0)
    return min(rows, key=lambda row: kinds.index(Embedding.Kind(row.kind)), default=None)


def _check_kinds(rows: Sequence[_Row], kinds: Sequence[str]) -> None:
    """Every kind has somebody to route to."""
    having = {
        ARROW: [row for row in rows if row.fingerprint.blob_id],
        PHATGOOSE: [row for row in rows if row.gates],
        GLIDER: [row for row in rows if row.glider],
    }
    missing = {
        ARROW: ("prototypes", "Leave arrow out, or take experts of a kind that adds matrices."),
        PHATGOOSE: ("gates", f"Leave phatgoose out, or have {gates.FILE} uploaded."),
        GLIDER: ("embeddings", "Leave glider_global out, or wait until the cards are embedded."),
    }
    faults = [
        Fault(f"/kinds/{place}", f"no expert with {missing[kind][0]}", "one expert or more", missing[kind][1])
        for place, kind in enumerate(kinds)
        if not having[kind]
    ]
    if faults:
        lacking = " and ".join(missing[kind][0] for kind in kinds if not having[kind])
        raise PackRefused(f"None of these experts has {lacking}.", faults=faults)


def _etag(base: BaseModel, rows: Sequence[_Row], kinds: Sequence[str], modules: Sequence[str], encoder: str) -> str:
    """A digest of all that the bytes depend on."""
    parts: list[Any] = [
        packs.FORMAT,
        fingerprints.VERSION,
        base.name,
        base.revision,
        kinds,
        sorted(set(modules)),
        encoder,
    ]
    for row in rows:
        glider = hashlib.sha256(row.glider.vector).hexdigest() if row.glider else None
        parts.append([row.name, row.revision.commit, row.source, row.gates.blob_id if row.gates else None, glider])
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


# What is in the files


def _check_size(wanted: Order) -> None:
    """Before anything is read: what the files hold is about what the pack will."""
    sizes = [
        (row.fingerprint.blob.size_bytes if row.fingerprint.blob and ARROW in wanted.kinds else 0)
        # Gates may be stored at half the width that they have in the pack.
        + (2 * row.gates.blob.size_bytes if row.gates else 0)
        for row in wanted.rows
    ]
    limit = settings.HUB_PACK_MAX_BYTES
    if sum(sizes) > limit:
        raise TooLarge(
            f"The pack would have about {sum(sizes)} bytes.",
            faults=[Fault("/experts", sum(sizes), f"at most {limit} bytes", "Take fewer experts, or name modules.")],
        )


def _prototypes(row: _Row, modules: Sequence[str]) -> prototypes.Prototypes:
    if row.fingerprint.blob is None:
        return prototypes.Prototypes({})
    with closing(storage.current().open(row.fingerprint.blob.sha256)) as file:
        found, _ = prototypes.read(file.read())
    return prototypes.Prototypes({name: found.modules[name] for name in _wanted(found.modules, modules)})


def _gates(row: _Row, modules: Sequence[str]) -> Mapping[str, Float32]:
    if row.gates is None:
        return {}
    with storage.current().as_path(row.gates.blob_id) as path:
        found, _ = gates.load(path)
    return {name: found[name] for name in _wanted(found, modules)}


def _glider(rows: Sequence[_Row]) -> tuple[Float32, np.ndarray[Any, np.dtype[np.bool_]]]:
    vectors = [np.frombuffer(row.glider.vector, "<f2").astype(np.float32) if row.glider else None for row in rows]
    width = next(vector.size for vector in vectors if vector is not None)
    matrix = np.stack([np.zeros(width, np.float32) if vector is None else vector for vector in vectors])
    return matrix, np.array([vector is not None for vector in vectors])


def _wanted(names: Iterator[str] | Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """Of these modules the named ones, by their whole name or its end, as PEFT's target_modules are."""
    ends = tuple(f".{module}" for module in modules)
    return [name for name in names if not modules or name in modules or name.endswith(ends)]


def _unknown_modules(modules: Sequence[str]) -> RequestInvalid:
    return _wrong("/modules", list(modules)[:20], "modules that the experts adapt", "Leave it out for all of them.")


def _member(row: _Row) -> Member:
    facts = row.fingerprint.facts
    return Member(
        expert=row.name,
        revision=row.revision.commit,
        sha256=row.source,
        rank=row.revision.rank or 0,
        scale=facts["scale"],
        target_modules=tuple(sorted(row.revision.facts.get("targets", []))),
        is_approximate=facts["approximate"],
    )


def _wrong(pointer: str, met: object, wanted: object, remedy: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer[1:]} is wrong.", faults=[Fault(pointer, met, wanted, remedy)])
