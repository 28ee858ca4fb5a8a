"""API keys of the caller."""

from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api import pagination
from api.authentication import require
from api.v1 import records, schemas
from api.v1.base import View
from registry.errors import NotFound, ScopeMissing
from registry.models import ApiKey
from registry.services import keys


class Keys(View):
    """GET the caller's keys, POST a new one."""

    @extend_schema(operation_id="keys_list", responses={200: schemas.KeyPage, **schemas.problems(403, 422)})
    def get(self, request: Request) -> Response:
        user = require(request, "read")
        rows = ApiKey.objects.filter(user=user, revoked_at=None).order_by("-id")
        return Response(pagination.page(request, rows, records.key))

    @extend_schema(
        operation_id="keys_create",
        request=schemas.KeyRequest,
        responses={201: schemas.NewKeyRecord, **schemas.problems(400, 403, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        user = require(request, "read")
        body = schemas.KeyRequest(data=request.data)
        body.is_valid(raise_exception=True)
        wanted = body.validated_data["scopes"]
        # A key must not be able to make a stronger one.
        if isinstance(request.auth, ApiKey) and not set(wanted) <= set(request.auth.scopes):
            raise ScopeMissing("A key can only make keys with scopes that it has itself.")
        row, secret = keys.create(
            user=user, name=body.validated_data["name"], scopes=wanted, expires_at=body.validated_data.get("expires_at")
        )
        return Response({**records.key(row), "key": secret}, status=201)


class OneKey(View):
    """DELETE a key: it ends at once."""

    @extend_schema(
        operation_id="keys_delete",
        responses={204: OpenApiResponse(description="Revoked."), **schemas.problems(403, 404)},
    )
    def delete(self, request: Request, key_id: int) -> Response:
        user = require(request, "read")
        row = ApiKey.objects.filter(pk=key_id, user=user, revoked_at=None).first()
        if row is None:
            raise NotFound("You have no such key.")
        keys.revoke(user=user, key=row)
        return Response(status=204)
