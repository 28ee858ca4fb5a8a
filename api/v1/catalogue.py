"""What can be chosen: methods and base models; and where some bytes are known."""

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api import pagination
from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry import selectors
from registry.errors import FileNotFound
from registry.models import BaseModel, Method
from registry.services import bases


class Methods(View):
    """GET every merge method, codec and route strategy with its parameters, ranges and paper."""

    @extend_schema(
        operation_id="methods_list",
        parameters=[OpenApiParameter("family", str, enum=Method.Family.values)],
        responses={200: schemas.MethodList, **schemas.problems()},
    )
    def get(self, request: Request) -> Response:
        rows = Method.objects.all()
        if family := request.query_params.get("family"):
            rows = rows.filter(family=family)
        items = [{"family": row.family, "name": row.name, "version": row.version, "spec": row.spec} for row in rows]
        return Response({"items": items, "next": None})


class Bases(View):
    """GET the base models that are known, POST one more."""

    @extend_schema(operation_id="bases_list", responses={200: schemas.BasePage, **schemas.problems(422)})
    def get(self, request: Request) -> Response:
        rows = BaseModel.objects.prefetch_related("aliases").order_by("name")
        return Response(pagination.page(request, rows, records.base))

    @extend_schema(
        operation_id="bases_create",
        request=schemas.BaseRequest,
        responses={201: schemas.BaseRecord, **schemas.problems(400, 403, 409, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        user = require(request, "write")
        body = schemas.BaseRequest(data=request.data)
        body.is_valid(raise_exception=True)
        made = bases.register(user=user, **body.validated_data)
        return Response(records.base(made), status=201)


class ByHash(View):
    """GET where bytes with this SHA-256 are, among what the caller may read."""

    @extend_schema(operation_id="by_hash", responses={200: schemas.HashRecord, **schemas.problems(404)})
    def get(self, request: Request, sha256: str) -> Response:
        found = selectors.files_with(sha256.lower(), viewer_of(request))
        if not found:
            raise FileNotFound("No file that you may read has this SHA-256.")
        return Response(
            {
                "sha256": sha256.lower(),
                "size": found[0].blob.size_bytes,
                "found_in": [
                    {
                        "repo": (row.revision.expert or row.revision.merge).full_name,  # type: ignore[union-attr]
                        "revision": row.revision.commit,
                        "path": row.path,
                    }
                    for row in found
                ],
            }
        )
