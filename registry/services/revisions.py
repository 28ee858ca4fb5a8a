"""Revisions: a changed tree is checked as a whole, its bytes are kept, then one transaction makes it visible.

Nothing is written before every check has passed, so a refused commit leaves rows and blobs as they were.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from registry import jobs
from registry.checks import cards, files
from registry.checks.cards import Figure
from registry.errors import (
    ExpertNotFound,
    Fault,
    ParentStale,
    RevisionNotFound,
)
from registry.models import (
    Blob,
    Evaluation,
    Expert,
    File,
    Ref,
    Revision,
    Upload,
    UploadFile,
    User,
)
from registry.services import audit, bases, blobs, experts, layouts, plans
from registry.services.blobs import Staged
from registry.services.plans import Changes, Plan

__all__ = ["Changes", "New", "branch_head", "commit", "record_figures"]

log = logging.getLogger(__name__)
TRIES = 8


@dataclass(frozen=True)
class New:
    """An expert that the commit itself will make."""

    full_name: str
    is_private: bool = False


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
            plan = plans.plan(parent, changes, given, namespace=namespace, opened=opened)
        if parent is not None and _is_same(parent, plan):
            return _finished(upload, parent)
        staged = [blobs.read_back(source) for source in plan.sources() if isinstance(source, Staged)]
        for source in staged:
            blobs.keep(source)
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
        tree = plans.tree_of(parent.parent, changes)
        if plans.manifest(tree) == parent.manifest_digest:
            return parent
    raise _stale(parent_commit, parent.commit if parent else "an empty branch")


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
        ref = Ref.objects.select_for_update().filter(expert=row, name=branch, kind=Ref.Kind.BRANCH).first()
        if ref is None:
            raise RevisionNotFound(f"{row.full_name} has no branch {branch[:80]!r} any more.")
        if ref.revision_id != (plan.parent.pk if plan.parent else None):
            return None
        revision, is_new = Revision.objects.get_or_create(
            expert=row, commit=plan.commit(row.pk), defaults=_columns(plan, user=user, message=message)
        )
        if is_new:
            _write_files(revision, plan)
            if plan.is_complete:
                chosen = plan.card.compression
                jobs.enqueue_pipeline(revision, user=user, compression=chosen.as_dict() if chosen else None)
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
    yield "instruction", card.instruction
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
            {
                "pointer": item.pointer,
                "met": item.met,
                "reason": item.reason,
                "remedy": item.remedy,
                "needs_base": item.needs_base,
            }
            for item in facts.blockers[:50]
        ],
    )
    shapes = {bases.pattern_of(module): list(shape) for module, shape in sorted(facts.shapes.items())}
    yield "shapes", dict(list(shapes.items())[:2000])
    yield "family", facts.family
    gains = {name: (0, size) if name in facts.feedforward else (size, 0) for name, size in facts.gains.items()}
    yield "layout", layouts.pack(facts.shapes or gains, facts.ranks)
    yield "saved_shapes", dict(list(plan.examined.saved_shapes.items())[:1000])
    if plan.statistics is not None:
        yield "statistics", dict(plan.statistics)
    if plan.gates is not None:
        yield "gates", dict(plan.gates)


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
    is_told_the_same = (row.description, row.examples) == (plan.card.description, list(plan.card.examples))
    if plan.card.instruction or not (row.is_instruction_generated and is_told_the_same):
        row.instruction, row.is_instruction_generated = plan.card.instruction, False
    row.base_model = plan.base
    row.description = plan.card.description
    row.examples = list(plan.card.examples)
    row.licence = plan.card.licence
    row.tags = list(plan.card.tags)
    row.adapter_kind = facts.kind if facts else ""
    row.rank = facts.rank if facts else None
    row.updated_at = timezone.now()
    row.save(
        update_fields=[
            *("base_model", "description", "examples", "instruction", "is_instruction_generated"),
            *("licence", "tags", "adapter_kind", "rank", "updated_at"),
        ]
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
                    preset=figure.preset,
                    density=figure.density,
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
