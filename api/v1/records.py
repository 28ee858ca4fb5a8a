"""Rows as the records that the REST API answers with: named fields, RFC 3339 UTC, sizes in bytes."""

from datetime import UTC, datetime
from typing import Any

from django.http import HttpRequest
from rest_framework.request import Request

from api.authentication import viewer_of
from registry import jobs, selectors
from registry.models import ApiKey, BaseModel, Encoded, Expert, File, Job, Merge, Revision, RoutingEvaluation
from registry.selectors import Viewer
from registry.services import evaluations, neighbours

AnyRequest = HttpRequest | Request


def moment(value: datetime | None) -> str | None:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z") if value else None


def expert_row(expert: Expert) -> dict[str, Any]:
    """An expert in a list."""
    return {
        "expert": expert.full_name,
        "visibility": expert.visibility,
        "base_model": expert.base_model.name if expert.base_model else None,
        "description": expert.description,
        "adapter_kind": expert.adapter_kind or None,
        "rank": expert.rank,
        "licence": expert.licence or None,
        "tags": expert.tags,
        "downloads": expert.downloads,
        "yanked": expert.yanked_at is not None,
        "created_at": moment(expert.created_at),
        "updated_at": moment(expert.updated_at),
    }


def expert(expert: Expert, revision: Revision | None, request: Request) -> dict[str, Any]:
    """An expert as its own page tells it, at one revision (None before the first commit)."""
    encoded = selectors.encoded(revision) if revision else None
    return {
        **expert_row(expert),
        "examples": expert.examples,
        "instruction": expert.instruction,
        "is_instruction_generated": expert.is_instruction_generated,
        "yank_reason": expert.yank_reason or None,
        "state": revision.state if revision else "incomplete",
        "revision": revision.commit if revision else None,
        "files": files(revision, expert.full_name, request) if revision else [],
        "jobs": [job(row) for row in jobs.of_pipeline(revision.pk)] if revision else [],
        "compressed": compressed(encoded, expert.full_name, request) if encoded else None,
        "compressed_forms": forms(revision, expert.full_name, request) if revision else [],
        "has_gates": revision is not None and "gates" in revision.facts,
        "same_weights": neighbours.same(revision, viewer_of(request)) if revision else [],
        # Every module by name fills pages for a large adapter; merges/check tells what matters of it.
        "facts": {name: value for name, value in revision.facts.items() if name != "layout"} if revision else {},
        "evaluations": [
            {
                "dataset": row.dataset,
                "metric": row.metric,
                "value": row.value,
                "base_value": row.base_value,
                "row_count": row.row_count,
                "source": row.source,
                "preset": row.preset,
                "density": row.density,
            }
            for row in revision.evaluations.all()
        ]
        if revision
        else [],
    }


def revision_row(revision: Revision) -> dict[str, Any]:
    return {
        "revision": revision.commit,
        "parent": revision.parent.commit if revision.parent else None,
        "state": revision.state,
        "message": revision.message,
        "author": revision.author.username if revision.author else None,
        "created_at": moment(revision.created_at),
    }


def files(revision: Revision, full_name: str, request: AnyRequest) -> list[dict[str, Any]]:
    rows = revision.files.select_related("blob").all()
    return [file(row, full_name, revision.commit, request) for row in rows]


def file(row: File, full_name: str, commit: str, request: AnyRequest) -> dict[str, Any]:
    return {
        "path": row.path,
        "size": row.blob.size_bytes,
        "sha256": row.blob_id,
        "url": request.build_absolute_uri(f"/{full_name}/resolve/{commit}/{row.path}"),
    }


def compressed(encoded: Encoded, full_name: str, request: AnyRequest) -> dict[str, Any]:
    return {
        "bytes": encoded.blob.size_bytes,
        "original_bytes": encoded.original_bytes,
        "density": encoded.density,
        "recipe": encoded.preset,
        "cosine": encoded.report.get("cosine"),
        "sha256": encoded.blob_id,
        # What each module lost fills pages for a large adapter; `moerge compress --details` tells it.
        "report": {name: value for name, value in encoded.report.items() if name != "modules"},
        "url": request.build_absolute_uri(f"/api/v1/experts/{full_name}/compressed"),
    }


def forms(revision: Revision, full_name: str, request: AnyRequest) -> list[dict[str, Any]]:
    """Every compressed form of a revision that was made, with what it lost and, where it was measured, its accuracy."""
    accuracies = selectors.accuracies(revision)
    return [
        form(row, revision, full_name, request, accuracy=accuracies.get((row.preset, row.density)))
        for row in selectors.forms(revision)
    ]


def form(
    row: Encoded, revision: Revision, full_name: str, request: AnyRequest, *, accuracy: float | None
) -> dict[str, Any]:
    report = row.report
    return {
        "preset": row.preset,
        "scale_rule": report.get("scale_rule"),
        "alpha": report.get("alpha"),
        "density": row.density,
        "is_default": row.is_own,
        "bytes": row.blob.size_bytes,
        "original_bytes": row.original_bytes,
        "ternary_ratio": report.get("ternary_ratio"),
        "ratio": report.get("ratio"),
        "kept": report.get("kept"),
        "cosine": report.get("cosine"),
        "product_cosine": report.get("product_cosine"),
        "product_rel_error": report.get("product_rel_error"),
        "sigma_ratio": report.get("sigma_ratio"),
        "warnings": report.get("warnings", []),
        "sha256": row.blob_id,
        "accuracy": accuracy,
        "url": request.build_absolute_uri(selectors.form_path(row, full_name, revision.commit)),
    }


def job(row: Job) -> dict[str, Any]:
    return {
        "id": row.pk,
        "kind": row.kind,
        "state": row.state,
        "progress": row.progress,
        "message": row.message,
        "error": row.error,
        "result": row.result,
        "attempt": row.attempt,
        "created_at": moment(row.created_at),
        "started_at": moment(row.started_at),
        "finished_at": moment(row.finished_at),
    }


def merge(row: Merge, request: AnyRequest) -> dict[str, Any]:
    """A merge: known by id, commit and repository before it is computed."""
    revision = Revision.objects.filter(merge=row).first()
    last_job = row.jobs.order_by("-created_at").first()
    return {
        "id": row.pk,
        "digest": row.recipe_id,
        "state": row.state,
        "repo": row.full_name,
        "commit": row.commit,
        "base_model": row.base_model.name,
        "method": row.recipe.method,
        "recipe": row.recipe.canonical,
        "parents": [
            {
                "expert": parent.revision.expert.full_name if parent.revision.expert else None,
                "revision": parent.revision.commit,
                "weight": parent.weight,
                "yanked": parent.revision.expert is not None and parent.revision.expert.yanked_at is not None,
            }
            for parent in row.parents.select_related("revision__expert__namespace")
        ],
        "job": job(last_job) if last_job else None,
        "report": row.report,
        "licence": row.licence,
        "files": files(revision, row.full_name, request) if revision else [],
        "created_at": moment(row.created_at),
        "finished_at": moment(row.finished_at),
    }


def key(row: ApiKey) -> dict[str, Any]:
    return {
        "id": row.pk,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at),
        "last_used_at": moment(row.last_used_at),
    }


def evaluation(row: RoutingEvaluation, viewer: Viewer) -> dict[str, Any]:
    return {
        "id": row.pk,
        "base_model": row.base_model.name if row.base_model else None,
        "strategy": row.strategy,
        "index_seq": row.index_seq,
        "figures": evaluations.told(row, viewer),
        "created_by": row.created_by.username if row.created_by else None,
        "created_at": moment(row.created_at),
    }


def base(row: BaseModel) -> dict[str, Any]:
    return {
        "name": row.name,
        "architecture": row.architecture or None,
        "licence": row.licence or None,
        "parameter_count": row.parameter_count,
        "aliases": [alias.key for alias in row.aliases.all()],
    }
