"""Routing: a query in, the experts for it out."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import viewer_of
from api.v1 import schemas
from api.v1.base import View
from registry.services import routing


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
