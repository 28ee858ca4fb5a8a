"""Evaluations of routing, and the catalogue of one base model for programs that route by themselves."""

from django.http import HttpResponse
from django.utils.http import content_disposition_header
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api import pagination
from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry.errors import Fault, RequestInvalid
from registry.selectors import Search
from registry.services import evaluations, routing_exports

FORMATS = ("vllm-sr", "jsonl")


class Evaluations(View):
    """GET what was measured of the router, newest first; POST what `moerge eval-router` measured."""

    @extend_schema(
        operation_id="evaluations_list",
        parameters=[
            OpenApiParameter("base_model", str, description="Name or alias of a base model."),
            OpenApiParameter("strategy", str),
            OpenApiParameter("limit", int),
            OpenApiParameter("cursor", int),
        ],
        responses={200: schemas.EvaluationPage, **schemas.problems(422)},
    )
    def get(self, request: Request) -> Response:
        viewer = viewer_of(request)
        words = {
            name: request.query_params.get(name, "").replace("\0", "")[:200] for name in ("base_model", "strategy")
        }
        rows = evaluations.last(base_model=words["base_model"], strategy=words["strategy"])
        return Response(pagination.page(request, rows, lambda row: records.evaluation(row, viewer)))

    @extend_schema(
        operation_id="evaluations_create",
        request=schemas.EvaluationRequest,
        responses={
            200: schemas.RouterEvaluation,
            201: schemas.RouterEvaluation,
            **schemas.problems(400, 403, 413, 415, 422),
        },
    )
    def post(self, request: Request) -> Response:
        user = require(request, "write")
        body = schemas.EvaluationRequest(data=request.data)
        body.is_valid(raise_exception=True)
        row, is_new = evaluations.publish(user=user, **body.validated_data)
        return Response(records.evaluation(row, viewer_of(request)), status=201 if is_new else 200)


class Export(View):
    """GET the experts of one base model that the caller may see, as a file for another router."""

    @extend_schema(
        operation_id="routing_export",
        parameters=[
            OpenApiParameter("format", str, enum=FORMATS, required=True),
            OpenApiParameter("base_model", str, required=True, description="Name or alias of a base model."),
            OpenApiParameter("owner", str),
            OpenApiParameter("tag", str, many=True),
            OpenApiParameter("licence", str),
            OpenApiParameter("threshold", float, description="vllm-sr: how near a request must be, 0 to 1."),
        ],
        responses={
            (200, "application/yaml"): OpenApiResponse(str, description="vLLM Semantic Router's configuration."),
            (200, "application/x-ndjson"): OpenApiResponse(str, description="One card a line."),
            **schemas.problems(404, 422),
        },
    )
    def get(self, request: Request) -> HttpResponse:
        kind = request.query_params.get("format", "")
        if kind not in FORMATS:
            fault = Fault("?format", kind[:40], list(FORMATS), "Choose one of these.")
            raise RequestInvalid("This format is not known.", faults=[fault])
        export = routing_exports.of(viewer_of(request), Search.of(request.query_params))
        if kind == "jsonl":
            body, media_type, name = "".join(routing_exports.card_lines(export)), "application/x-ndjson", "cards.jsonl"
        else:
            threshold = _threshold(request.query_params.get("threshold", ""))
            body, media_type, name = (
                routing_exports.vllm_sr(export, threshold=threshold),
                "application/yaml",
                "vllm-sr.yaml",
            )
        # What a caller may see is the caller's own.
        headers = {
            "Content-Disposition": content_disposition_header(as_attachment=True, filename=name) or "",
            "Cache-Control": "private, no-store",
            "X-Content-Type-Options": "nosniff",
        }
        return HttpResponse(body, content_type=f"{media_type}; charset=utf-8", headers=headers)


def _threshold(text: str) -> float:
    if not text:
        return routing_exports.VLLM_SR_THRESHOLD
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RequestInvalid(
            "The threshold is out of range.",
            faults=[Fault("?threshold", text[:40], "a number from 0 to 1", "Leave it out for the usual one.")],
        )
    return value
