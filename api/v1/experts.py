"""Experts: list, make, read, change, remove; their revisions; their compressed forms."""

from django.http import HttpResponseBase
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api import downloads, pagination
from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry import selectors
from registry.checks import compression
from registry.errors import FileNotFound, NotAllowed
from registry.models import User
from registry.services import encodings, experts

LIST_PARAMETERS = [
    OpenApiParameter("search", str, description="Words in name, description, examples or tags."),
    OpenApiParameter("base_model", str, description="Name or alias of a base model."),
    OpenApiParameter("owner", str),
    OpenApiParameter("tag", str, many=True),
    OpenApiParameter("licence", str),
    OpenApiParameter("kind", str, description="Kind of adapter: LORA, IA3 …"),
    OpenApiParameter("sort", str, enum=sorted(selectors.ORDERS)),
    OpenApiParameter("limit", int),
    OpenApiParameter("cursor", int),
]


class Experts(View):
    """GET the catalogue, POST an empty expert."""

    @extend_schema(
        operation_id="experts_list",
        parameters=LIST_PARAMETERS,
        responses={200: schemas.ExpertPage, **schemas.problems(422)},
    )
    def get(self, request: Request) -> Response:
        found = selectors.search(viewer_of(request), selectors.Search.of(request.query_params))
        return Response(pagination.page(request, found, records.expert_row))

    @extend_schema(
        operation_id="experts_create",
        request=schemas.ExpertCreate,
        responses={201: schemas.ExpertRecord, **schemas.problems(400, 403, 409, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        user = require(request, "write")
        body = schemas.ExpertCreate(data=request.data)
        body.is_valid(raise_exception=True)
        made = experts.create(
            user=user, full_name=body.validated_data["expert"], private=body.validated_data["private"]
        )
        return Response(records.expert(made, None, request), status=201)


class OneExpert(View):
    """GET, PATCH, DELETE owner/name."""

    @extend_schema(operation_id="experts_read", responses={200: schemas.ExpertRecord, **schemas.problems(404)})
    def get(self, request: Request, owner: str, name: str) -> Response:
        expert = selectors.expert(f"{owner}/{name}", viewer_of(request))
        return Response(records.expert(expert, selectors.head(expert), request))

    @extend_schema(
        operation_id="experts_change",
        request=schemas.ExpertChange,
        responses={200: schemas.ExpertRecord, **schemas.problems(400, 403, 404, 415, 422)},
    )
    def patch(self, request: Request, owner: str, name: str) -> Response:
        user = require(request, "write")
        body = schemas.ExpertChange(data=request.data)
        body.is_valid(raise_exception=True)
        expert = selectors.expert(f"{owner}/{name}", user)
        if "visibility" in body.validated_data:
            experts.change_visibility(user=user, expert=expert, visibility=body.validated_data["visibility"])
        if "yanked" in body.validated_data:
            experts.yank(
                user=user,
                expert=expert,
                yanked=body.validated_data["yanked"],
                reason=body.validated_data.get("yank_reason", ""),
            )
        expert = selectors.expert(f"{owner}/{name}", user)
        return Response(records.expert(expert, selectors.head(expert), request))

    @extend_schema(
        operation_id="experts_delete",
        responses={204: OpenApiResponse(description="Deleted."), **schemas.problems(403, 404, 409)},
    )
    def delete(self, request: Request, owner: str, name: str) -> Response:
        user = require(request, "write")
        experts.delete(user=user, expert=selectors.expert(f"{owner}/{name}", user))
        return Response(status=204)


class Revisions(View):
    """GET the revisions of an expert, newest first."""

    @extend_schema(
        operation_id="experts_revisions", responses={200: schemas.RevisionPage, **schemas.problems(404, 422)}
    )
    def get(self, request: Request, owner: str, name: str) -> Response:
        expert = selectors.expert(f"{owner}/{name}", viewer_of(request))
        return Response(pagination.page(request, selectors.history(expert), records.revision_row))


class OneRevision(View):
    """GET an expert as it was at one revision: a branch, a tag or a full commit."""

    @extend_schema(operation_id="experts_revision", responses={200: schemas.ExpertRecord, **schemas.problems(404)})
    def get(self, request: Request, owner: str, name: str, revision: str) -> Response:
        repository = selectors.repository(f"{owner}/{name}", viewer_of(request))
        if repository.expert is None:
            raise FileNotFound("A merge is read at /api/v1/merges/{id}.")
        return Response(records.expert(repository.expert, selectors.revision(repository, revision), request))


class Compressed(View):
    """GET one compressed form of a revision, with ranges; one that is not there yet is made."""

    @extend_schema(
        operation_id="experts_compressed",
        description=(
            "Without density and preset: the form that the revision was published with. A form that is not there is "
            "made by a job: 503 with Retry-After, `job` and `job_url` until it is done, 409 when it failed. Densities "
            "0.05, 0.1, 0.2, 0.3 and 0.5 of preset default are made for every reader, others need scope write and the "
            "right to write to the expert."
        ),
        parameters=[
            OpenApiParameter("revision", str, description="A branch, a tag or a full commit; main when left out."),
            OpenApiParameter("density", str, description="Share of values kept: 0.05, 0.1, 0.2, 0.3, 0.5 …"),
            OpenApiParameter("preset", str, description="default, paper, hq or int4."),
        ],
        responses={
            (200, "application/octet-stream"): bytes,
            (206, "application/octet-stream"): bytes,
            304: OpenApiResponse(description="The copy that If-None-Match names is current."),
            **schemas.problems(403, 404, 409, 412, 416, 422),
        },
    )
    def get(self, request: Request, owner: str, name: str) -> HttpResponseBase:
        query = request.query_params
        repository = selectors.repository(f"{owner}/{name}", viewer_of(request))
        revision = selectors.revision(repository, query.get("revision") or "main")
        choice = compression.asked(preset=query.get("preset"), density=query.get("density"))

        def permit() -> None:
            user = require(request, "write")
            if repository.expert is None and not user.is_staff:
                raise NotAllowed("Of a merge, which has no owner, only the standard densities are made.")
            if repository.expert is not None:
                experts.require_write(user, repository.expert)

        encoded = encodings.obtain(revision=revision, choice=choice, user=asker(request), permit=permit)
        kind = encoded.preset if encoded.preset == compression.INT4 else "compeft"
        return downloads.respond(
            request._request,  # noqa: SLF001 - ranges and conditions are in the plain request
            blob=encoded.blob,
            etag=encoded.blob_id,
            filename=f"{name}.{kind}.safetensors",
            commit=revision.commit,
            is_private=repository.is_private,
        )


def asker(request: Request) -> User | None:
    """Whom a job is to be put down to; None for a reader without an account."""
    return request.user if isinstance(request.user, User) else None
