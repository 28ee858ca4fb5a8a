"""Revisions: a changed tree is checked as a whole, its bytes are kept, then one transaction makes it visible.

Nothing is written before every check has passed, so a refused commit leaves rows and blobs as they were.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from moerge.tensors.adapters import AdapterConfig
from registry import jobs, storage
from registry.checks import adapters, cards, files
from registry.checks.adapters import Examined
from registry.checks.cards import Card, Figure
from registry.errors import (
    BaseUnknown,
    ExpertNotFound,
    Fault,
    FileNotFound,
    ParentStale,
    QuotaExceeded,
    RevisionNotFound,
    TooLarge,
    UploadInvalid,
)
from registry.models import (
    BaseModel,
    Blob,
    Evaluation,
    Expert,
    File,
    Namespace,
    Ref,
    Revision,
    Upload,
    UploadFile,
    User,
)
from registry.services import audit, bases, blobs, experts
from registry.services.blobs import Staged
from registry.services.limits import header_limits

log = logging.getLogger(__name__)
TRIES = 8


@dataclass(frozen=True)
class Changes:
    """What a commit does to the tree of its parent: files by path, staged or kept already, and what goes."""

    added: Mapping[str, Staged | Blob] = field(default_factory=dict)
    deleted: tuple[str, ...] = ()
    deleted_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class New:
    """An expert that the commit itself will make."""

    full_name: str
    is_private: bool = False


@dataclass(frozen=True)
class Entry:
    """One file of a tree that is about to be."""

    path: str
    sha256: str
    size_bytes: int
    source: Staged | Blob
    is_new: bool


@dataclass(frozen=True)
class Plan:
    """A tree that has passed every check, and what its revision will say."""

    parent: Revision | None
    tree: dict[str, Entry]
    card: Card
    overrides: dict[str, Any]
    base: BaseModel | None
    examined: Examined | None
    warnings: tuple[str, ...]
    manifest_digest: str

    @property
    def is_complete(self) -> bool:
        return self.examined is not None

    def commit(self, expert_id: int) -> str:
        """The 40 hexadecimal digits that name the revision: the same change of the same parent has the same name."""
        base = self.base.name if self.base else ""
        parts = [expert_id, self.parent.commit if self.parent else "", self.manifest_digest, base, self.overrides]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha1(canonical.encode(), usedforsecurity=False).hexdigest()


def commit(
    *,
    user: User,
    expert: Expert | New,
    changes: Changes,
    message: str = "",
    branch: str = "main",
    parent_commit: str | None = None,
    card: Mapping[str, Any] | None = None,
    upload: Upload | None = None,
) -> Revision:
    """Check a change, keep its bytes and make it the head of a branch.

    The same change of the same parent gives the revision that is there already. With `parent_commit` a branch that has
    moved is ParentStale; without, the change is applied to where the branch is now. `card` holds card fields given
    beside the files. Staged files are consumed on success and left alone on refusal.

    Raises NotAllowed, ExpertNotFound, RevisionNotFound, ParentStale, FileNotFound, UploadInvalid, BaseUnknown,
    TooLarge, QuotaExceeded, StorageUnavailable.
    """
    if isinstance(expert, New):
        namespace, _ = experts.claim(user=user, full_name=expert.full_name)
    else:
        experts.require_write(user, expert)
        namespace = expert.namespace
    given = cards.overrides(card or {})
    for _ in range(TRIES):
        parent = None if isinstance(expert, New) else branch_head(expert, branch)
        known = repeated(parent, parent_commit, changes)
        if known is not None:
            return _finished(upload, known)
        with ExitStack() as opened:
            plan = _plan(parent, changes, given, namespace=namespace, opened=opened)
        if parent is not None and _is_same(parent, plan):
            return _finished(upload, parent)
        for entry in plan.tree.values():
            if isinstance(entry.source, Staged):
                blobs.keep(entry.source)
        revision = _publish(expert, plan, branch=branch, user=user, message=message, upload=upload)
        if revision is not None:
            return revision
        if parent_commit:
            raise _stale(parent_commit, branch)
        # Bytes of a try that lost the race are in storage now, so the next one reads them there.
        changes = Changes(
            {path: _kept(source) for path, source in changes.added.items()}, changes.deleted, changes.deleted_folders
        )
    raise _stale("", branch)


def branch_head(expert: Expert, branch: str) -> Revision | None:
    """The revision a branch points at; None when it has none yet. Raises RevisionNotFound for no such branch."""
    ref = Ref.objects.filter(expert=expert, name=branch, kind=Ref.Kind.BRANCH).select_related("revision").first()
    if ref is None:
        raise RevisionNotFound(f"{expert.full_name} has no branch {branch[:80]!r}.")
    return ref.revision


def repeated(parent: Revision | None, parent_commit: str | None, changes: Changes) -> Revision | None:
    """The head, when it is what this very change of `parent_commit` made: an answer was lost and is asked for again.

    Raises ParentStale when the branch has moved on to anything else.
    """
    if not parent_commit or (parent is not None and parent.commit == parent_commit):
        return None
    if parent is not None and parent.parent is not None and parent.parent.commit == parent_commit:
        tree = _tree(parent.parent, changes)
        if _manifest(tree) == parent.manifest_digest:
            return parent
    raise _stale(parent_commit, parent.commit if parent else "an empty branch")


def _plan(
    parent: Revision | None, changes: Changes, given: Mapping[str, Any], *, namespace: Namespace, opened: ExitStack
) -> Plan:
    """Everything that can be said against a change, said before anything is written; cheap checks first."""
    tree = _tree(parent, changes)
    _check_sizes(tree, namespace)
    limits = header_limits()
    paths: dict[str, Path] = {}

    def path_of(entry: Entry) -> Path:
        if entry.path not in paths:
            paths[entry.path] = _open(entry.source, opened)
        return paths[entry.path]

    new = [entry for entry in tree.values() if entry.is_new]
    for entry in new:
        rule = files.rule_for(entry.path, pointer=files.pointer_of(entry.path), limit_bytes=settings.HUB_FILE_MAX_BYTES)
        files.check_content(entry.path, path_of(entry), rule, limits=limits)
    overrides = _inherited(parent, given)
    card_entry, config_entry, weights_entry = (tree.get(path) for path in (files.CARD, files.CONFIG, files.WEIGHTS))
    card = cards.parse(files.read_text(files.CARD, path_of(card_entry))) if card_entry else Card()
    card = cards.merged(card, overrides)
    config = adapters.read_config(path_of(config_entry)) if config_entry else None
    examined = None
    base, warnings = _base(config, card, given) if config else (None, [])
    if config and weights_entry:
        examined = adapters.examine(config, path_of(weights_entry), limits=limits)
        if base is None:
            raise _question(config, card)
        _check_base(base, examined)
        warnings += examined.facts.warnings
    for entry in new:
        if files.is_weights(entry.path):
            warnings += adapters.scan(entry.path, path_of(entry), limits=limits)
    warnings += _lacking(card) if examined else []
    return Plan(parent, tree, card, overrides, base, examined, tuple(dict.fromkeys(warnings)), _manifest(tree))


def _tree(parent: Revision | None, changes: Changes) -> dict[str, Entry]:
    """The parent's files with the change applied, by path."""
    tree: dict[str, Entry] = {}
    if parent is not None:
        for file in File.objects.filter(revision=parent).select_related("blob"):
            tree[file.path] = Entry(file.path, file.blob_id, file.blob.size_bytes, file.blob, is_new=False)
    for path in changes.deleted:
        if tree.pop(path, None) is None:
            raise FileNotFound(f"There is no file {path[:200]!r} to delete.")
    for folder in changes.deleted_folders:
        start = folder.rstrip("/") + "/"
        gone = [path for path in tree if path.startswith(start)]
        if not gone:
            raise FileNotFound(f"There is no folder {folder[:200]!r} to delete.")
        for path in gone:
            del tree[path]
    for path, source in changes.added.items():
        before = tree.get(path)
        is_new = before is None or before.sha256 != source.sha256
        tree[path] = Entry(path, source.sha256, source.size_bytes, source, is_new=is_new)
    return dict(sorted(tree.items()))


def _check_sizes(tree: Mapping[str, Entry], namespace: Namespace) -> None:
    if len(tree) > settings.HUB_UPLOAD_MAX_FILES:
        raise TooLarge(
            f"{len(tree)} files are too many.",
            faults=[Fault("/files", len(tree), f"at most {settings.HUB_UPLOAD_MAX_FILES}", "Leave files out.", "U4")],
        )
    seen: dict[str, str] = {}
    for path in tree:
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            fault = Fault(
                files.pointer_of(path),
                path,
                f"a name that differs from {other} by more than case",
                "Rename one of the two.",
                "U3",
            )
            raise UploadInvalid(f"{path} and {other} are one file on some systems.", faults=[fault])
        if any(path.startswith(f"{folder}/") for folder in tree if len(folder) < len(path)):
            fault = Fault(
                files.pointer_of(path), path, "a folder that is not also a file", "Rename one of the two.", "U3"
            )
            raise UploadInvalid(f"A part of {path} is a file.", faults=[fault])
    total = sum(entry.size_bytes for entry in tree.values())
    if total > settings.HUB_UPLOAD_MAX_BYTES:
        raise TooLarge(
            f"The files have {total} bytes together.",
            faults=[Fault("/files", total, f"at most {settings.HUB_UPLOAD_MAX_BYTES} bytes", "Leave files out.", "U4")],
        )
    check_quota(namespace, sum(entry.size_bytes for entry in tree.values() if entry.is_new))


def check_quota(namespace: Namespace, more_bytes: int) -> None:
    """Raises QuotaExceeded when a namespace would hold more than it may; bytes that it holds twice count once."""
    held = (
        (
            Blob.objects.filter(
                pk__in=File.objects.filter(revision__expert__namespace=namespace).values("blob")
            ).aggregate(size=Sum("size_bytes"))["size"]
        )
        or 0
    )
    limit = settings.HUB_NAMESPACE_MAX_BYTES
    if held + more_bytes > limit:
        raise QuotaExceeded(
            f"{namespace.name} holds {held} bytes and may hold {limit}.",
            faults=[
                Fault(
                    "/files",
                    held + more_bytes,
                    f"at most {limit} bytes",
                    "Delete experts, or ask an administrator.",
                    "L3",
                )
            ],
        )


def _open(source: Staged | Blob, opened: ExitStack) -> Path:
    if isinstance(source, Staged):
        return source.path
    return opened.enter_context(storage.current().as_path(source.sha256))


def _inherited(parent: Revision | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Card fields given beside files hold until others are given."""
    before = parent.facts.get("overrides", {}) if parent else {}
    return {**before, **given}


def _base(config: AdapterConfig, card: Card, given: Mapping[str, Any]) -> tuple[BaseModel | None, list[str]]:
    """The base of the tree and warnings: what the config names; where that leads nowhere, what the card answers.

    An answer that is given beside the files and leads elsewhere than the config is refused; a card that does is warned
    about. None when nobody names a base that is known.
    """
    stated = bases.find(config.base_model_name_or_path)
    answer = given.get("base_model")
    if answer:
        other = bases.resolve(answer, pointer="/card/base_model")
        if stated is not None and other.pk != stated.pk:
            remedy = f"Leave it out, or correct {bases.POINTER[1:]}."
            raise UploadInvalid(
                f"The config names {stated.name} as base, the upload {other.name}.",
                faults=[Fault("/card/base_model", answer, stated.name, remedy)],
            )
        return other, []
    named = bases.find(card.base_model)
    if stated is None or named is None or named.pk == stated.pk:
        return stated or named, []
    return stated, [f"The card names {named.name} as base, the config {stated.name}; the config holds."]


def _question(config: AdapterConfig, card: Card) -> BaseUnknown:
    """The base is asked for: neither config nor card names one that is known."""
    stated = config.base_model_name_or_path
    if card.base_model and card.base_model != stated and not bases.is_path(card.base_model):
        what = f"The base model is not known here; README.md names {card.base_model!r}, which is not known either"
    elif not stated:
        what = "The adapter does not say which base model it was trained on"
    elif bases.is_path(stated):
        what = "The base model is given as a path on somebody's machine"
    else:
        what = "The base model is not known here"
    return bases.unknown(stated, pointer=bases.POINTER, what=what)


def _check_base(base: BaseModel, examined: Examined) -> None:
    found = bases.mismatch(base, examined.facts.shapes)
    if found is None:
        return
    module, met, wanted = found
    remedy = "Name the base that the adapter was trained on; if it is this one, train on its unchanged layers."
    raise UploadInvalid(
        f"{module} has a delta of {met[0]} x {met[1]}; {base.name} has {wanted[0]} x {wanted[1]} there.",
        faults=[Fault(files.pointer_of(files.WEIGHTS, module), list(met), list(wanted), remedy, "T4")],
    )


def _lacking(card: Card) -> list[str]:
    """What a card should have so that the expert is found by what it is good at."""
    warnings = []
    if not card.description:
        warnings.append("The card has no description: write `moerge: task:` into the front matter of README.md.")
    if len(card.examples) < 5:
        warnings.append(f"The card has {len(card.examples)} example inputs; five or more make routing much better.")
    return warnings


def _manifest(tree: Mapping[str, Entry]) -> str:
    rows = [[entry.path, entry.sha256, entry.size_bytes] for _, entry in sorted(tree.items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _is_same(parent: Revision, plan: Plan) -> bool:
    """Whether a change changes nothing: neither files nor what was given beside them nor the base."""
    base_id = plan.base.pk if plan.base else None
    return (
        parent.manifest_digest == plan.manifest_digest
        and parent.facts.get("overrides", {}) == plan.overrides
        and parent.base_model_id == base_id
    )


def _publish(
    expert: Expert | New, plan: Plan, *, branch: str, user: User, message: str, upload: Upload | None
) -> Revision | None:
    """Make the planned tree the head of a branch, in one transaction; None when the branch has moved since."""
    with transaction.atomic():
        if isinstance(expert, New):
            expert = experts.create(user=user, full_name=expert.full_name, private=expert.is_private)
        row = Expert.objects.select_for_update(of=("self",)).filter(pk=expert.pk, deleted_at=None).first()
        if row is None:
            raise ExpertNotFound(f"There is no expert {expert.full_name!r} that you may see.")
        ref = Ref.objects.select_for_update().get(expert=row, name=branch)
        if ref.revision_id != (plan.parent.pk if plan.parent else None):
            return None
        revision, is_new = Revision.objects.get_or_create(
            expert=row, commit=plan.commit(row.pk), defaults=_columns(plan, user=user, message=message)
        )
        if is_new:
            _write_files(revision, plan)
            if plan.is_complete:
                jobs.enqueue_pipeline(revision, user=user)
        ref.revision = revision
        ref.save(update_fields=["revision", "updated_at"])
        if branch == "main":
            _tell_expert(row, plan)
        if plan.base and plan.examined and row.visibility == Expert.Visibility.PUBLIC:
            bases.learn(plan.base, plan.examined.facts.shapes)
        audit.record(user, "revision.commit", f"{row.full_name}@{revision.commit}", branch=branch)
        _finished(upload, revision)
    log.info("Committed.", extra={"expert.name": row.full_name, "revision.digest": revision.commit})
    return revision


def _columns(plan: Plan, *, user: User, message: str) -> dict[str, Any]:
    facts = plan.examined.facts if plan.examined else None
    return {
        "parent": plan.parent,
        "manifest_digest": plan.manifest_digest,
        "message": message[:10_000],
        "author": user,
        "state": Revision.State.PROCESSING if plan.is_complete else Revision.State.INCOMPLETE,
        "base_model": plan.base,
        "adapter_kind": facts.kind if facts else "",
        "rank": facts.rank if facts else None,
        "parameter_count": facts.n_parameters if facts else None,
        "facts": dict(_facts(plan)),
    }


def _facts(plan: Plan) -> Iterator[tuple[str, Any]]:
    """What a revision knows about itself; by module pattern rather than module, so that it stays small."""
    card = plan.card
    yield "description", card.description
    yield "examples", list(card.examples)
    yield "licence", card.licence
    yield "tags", list(card.tags)
    yield "card_data", dict(card.data)
    yield "overrides", plan.overrides
    yield "warnings", list(plan.warnings)
    if plan.examined is None:
        return
    config, facts = plan.examined.config, plan.examined.facts
    yield "base_stated", config.base_model_name_or_path
    yield "kind", facts.kind
    yield "rank", facts.rank
    yield "ranks", sorted(set(facts.ranks.values()))
    yield "module_count", len(facts.modules)
    yield "targets", list(facts.targets)
    yield "saved", list(facts.saved)[:200]
    yield "is_mergeable", facts.is_mergeable
    yield (
        "blockers",
        [
            {"pointer": item.pointer, "met": item.met, "reason": item.reason, "remedy": item.remedy}
            for item in facts.blockers[:50]
        ],
    )
    shapes = {bases.pattern_of(module): list(shape) for module, shape in sorted(facts.shapes.items())}
    yield "shapes", dict(list(shapes.items())[:2000])


def _write_files(revision: Revision, plan: Plan) -> None:
    blobs.touch(entry.sha256 for entry in plan.tree.values())
    rule_of = {
        path: files.rule_for(path, pointer=files.pointer_of(path), limit_bytes=settings.HUB_FILE_MAX_BYTES)
        for path in plan.tree
    }
    File.objects.bulk_create(
        [
            File(revision=revision, path=path, blob_id=entry.sha256, is_large=rule_of[path].is_large)
            for path, entry in plan.tree.items()
        ]
    )


def _tell_expert(row: Expert, plan: Plan) -> None:
    """Bring the columns by which experts are listed and searched in line with the new head of `main`."""
    facts = plan.examined.facts if plan.examined else None
    row.base_model = plan.base
    row.description = plan.card.description
    row.examples = list(plan.card.examples)
    row.licence = plan.card.licence
    row.tags = list(plan.card.tags)
    row.adapter_kind = facts.kind if facts else ""
    row.rank = facts.rank if facts else None
    row.updated_at = timezone.now()
    row.save(
        update_fields=["base_model", "description", "examples", "licence", "tags", "adapter_kind", "rank", "updated_at"]
    )


def record_figures(revision: Revision, figures: Iterable[Figure]) -> None:
    """Write the figures of a card as evaluations of its revision, in place of those written before."""
    with transaction.atomic():
        Revision.objects.select_for_update(of=("self",)).get(pk=revision.pk)
        Evaluation.objects.filter(revision=revision, source=Evaluation.Source.CARD).delete()
        Evaluation.objects.bulk_create(
            [
                Evaluation(
                    revision=revision,
                    source=Evaluation.Source.CARD,
                    dataset=figure.dataset,
                    metric=figure.metric,
                    value=figure.value,
                    base_value=figure.base_value,
                    row_count=figure.row_count,
                )
                for figure in figures
            ]
        )


def _finished(upload: Upload | None, revision: Revision) -> Revision:
    if upload is not None:
        with transaction.atomic():
            Upload.objects.filter(pk=upload.pk).update(state=Upload.State.COMPLETED, revision=revision)
            # From here on the files of the revision hold the blobs.
            UploadFile.objects.filter(upload=upload).update(blob=None)
    return revision


def _kept(source: Staged | Blob) -> Blob:
    return source if isinstance(source, Blob) else Blob.objects.get(pk=source.sha256)


def _stale(met: str, now: str) -> ParentStale:
    remedy = "Fetch the branch, apply your change to what is there now, and commit again."
    return ParentStale(
        "The branch has moved since you last looked.", faults=[Fault("/parent_commit", met or None, now, remedy, "A3")]
    )
