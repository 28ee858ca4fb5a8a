"""Routing: a query in, the experts for it out."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import require, viewer_of
from api.v1 import records, schemas
from api.v1.base import View
from registry.services import previews, route_merges, routing
from registry.services.route_merges import Wish


class Route(View):
    """POST a query, or up to 32, for one base model or for all."""

    @extend_schema(
        operation_id="route",
        request=schemas.RouteRequest,
        responses={200: schemas.RouteAnswer, **schemas.problems(400, 413, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        body = schemas.RouteRequest(data=request.data)
        body.is_valid(raise_exception=True)
        return Response(routing.route(viewer=viewer_of(request), **body.validated_data))


class RouteVector(View):
    """POST a query as the vector that the hub's encoder makes of it, for one base model or for all."""

    @extend_schema(
        operation_id="route_vector",
        request=schemas.RouteVectorRequest,
        responses={200: schemas.RouteAnswer, **schemas.problems(400, 413, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        body = schemas.RouteVectorRequest(data=request.data)
        body.is_valid(raise_exception=True)
        return Response(routing.route_vector(viewer=viewer_of(request), **body.validated_data))


class Preview(View):
    """POST the draft of a card: would its own examples be routed to it, and who comes before? Nothing is stored."""

    @extend_schema(
        operation_id="route_preview",
        request=schemas.PreviewRequest,
        responses={200: schemas.PreviewAnswer, **schemas.problems(400, 413, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        body = schemas.PreviewRequest(data=request.data)
        body.is_valid(raise_exception=True)
        return Response(previews.preview(viewer=viewer_of(request), **body.validated_data))


class RouteMerge(View):
    """POST a text: the experts that fit it best are merged by their scores, as a virtual repository."""

    @extend_schema(
        operation_id="route_merge",
        request=schemas.RouteMergeRequest,
        responses={
            200: schemas.RouteMergeAnswer,
            202: schemas.RouteMergeAnswer,
            **schemas.problems(400, 403, 404, 409, 413, 415, 422),
        },
    )
    def post(self, request: Request) -> Response:
        user = require(request, "merge")
        body = schemas.RouteMergeRequest(data=request.data)
        body.is_valid(raise_exception=True)
        given = dict(body.validated_data)
        question = {
            name: given[name] for name in ("text", "base_model", "filters", "min_score", "min_seq") if name in given
        }
        wish = Wish(
            method=given["method"],
            top_k=given["top_k"],
            temperature=given["temperature"],
            rest={
                name: given[name]
                for name in ("parameters", "seed", "output", "licence", "acknowledge_licences")
                if name in given
            },
        )
        found = route_merges.route_and_merge(
            user=user, viewer=viewer_of(request), question=question, wish=wish, start=given["start"]
        )
        merge = records.merge(found.merge, request)
        answer = {
            "route": found.results,
            "skipped": found.skipped,
            "index_seq": found.index_seq,
            "recipe": merge["recipe"],
            "merge": merge,
        }
        return Response(answer, status=202 if found.is_new else 200)
