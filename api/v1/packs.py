"""Routing packs: one file with which a client routes every token among some experts itself."""

from typing import Any

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers as s
from rest_framework.request import Request

from api import downloads
from api.authentication import viewer_of
from api.v1 import schemas
from api.v1.base import View
from moerge.routing import packs as packing
from registry.services import packs

MEDIA_TYPE = "application/octet-stream"


class PackRequest(schemas.StrictSerializer):
    base_model = s.CharField(max_length=200)
    experts = s.ListField(
        child=s.CharField(max_length=300), required=False, allow_empty=False, max_length=1000,
        help_text="owner/name, owner/name@revision, or owner/name@compeft-k10 for what its compressed form decodes to.",
    )  # fmt: skip
    query = s.CharField(required=False, max_length=20_000, help_text="Instead of experts: those that fit this text.")
    top_k = s.IntegerField(required=False, help_text="How many experts to take for the query.")
    kinds = s.ListField(child=s.ChoiceField(packing.KINDS), required=False, allow_empty=False, max_length=10)
    modules = s.ListField(
        child=s.CharField(max_length=512), required=False, max_length=1000,
        help_text="Whole names of modules or their ends (q_proj); all when left out.",
    )  # fmt: skip


class Packs(View):
    """POST the experts of one base model, or a query that finds them."""

    @extend_schema(
        operation_id="routing_packs",
        description=(
            "A safetensors file: Arrow prototypes computed from the weights, PHATGOOSE gates as they were uploaded, "
            "and GLIDER's embeddings of the experts' instructions. The same experts, revisions, kinds and modules give "
            "the same bytes under the same ETag. 503 with Retry-After, `job` and `job_url` while prototypes are made."
        ),
        request=PackRequest,
        parameters=[OpenApiParameter("If-None-Match", str, OpenApiParameter.HEADER)],
        responses={
            (200, MEDIA_TYPE): bytes,
            304: OpenApiResponse(description="The pack that If-None-Match names is current."),
            **schemas.problems(400, 404, 409, 413, 415, 422),
        },
    )
    def post(self, request: Request) -> HttpResponseBase:
        body = PackRequest(data=request.data)
        body.is_valid(raise_exception=True)
        given: dict[str, Any] = dict(body.validated_data)
        order = packs.order(viewer=viewer_of(request), **given)
        headers = {
            "ETag": f'"{order.etag}"',
            "Cache-Control": downloads.caching(is_private=order.is_private, is_fixed=False),
            "Content-Disposition": 'attachment; filename="routing_pack.safetensors"',
            "X-Content-Type-Options": "nosniff",
        }
        known = request.headers.get("If-None-Match")
        if known is not None and downloads.names(known, order.etag, is_weak_enough=True):
            return HttpResponse(status=304, headers=headers)
        return HttpResponse(packs.build(order), content_type=MEDIA_TYPE, headers=headers)
