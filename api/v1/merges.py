"""Merges: ask for one, check one before, read one."""

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from api import pagination, yaml_parser
from api.authentication import require, viewer_of
from api.json_parser import JsonParser
from api.v1 import records, schemas
from api.v1.base import View
from registry import selectors
from registry.errors import Fault, RequestInvalid
from registry.models import Merge
from registry.services import merges, recipes


def body_of(request: Request) -> dict[str, object]:
    """The body, which must be an object; the recipe's own rules say the rest."""
    if not isinstance(request.data, dict):
        raise RequestInvalid(
            "The body is not an object.",
            faults=[Fault("", type(request.data).__name__, "a JSON object with a recipe", "Send the recipe alone.")],
        )
    return dict(request.data)


def take_start(body: dict[str, object]) -> bool:
    """Take out of a body whether the merge is to be computed now, which is no part of the recipe."""
    start = body.pop("start", True)
    if not isinstance(start, bool):
        fault = Fault("/start", start, "true or false", "Leave it out to have the merge computed now.")
        raise RequestInvalid("The field start is no truth value.", faults=[fault])
    return start


class Merges(View):
    """GET the merges that the caller may see, POST a recipe as JSON or YAML."""

    parser_classes = (JsonParser, *yaml_parser.PARSERS)

    @extend_schema(operation_id="merges_list", responses={200: schemas.MergePage, **schemas.problems(422)})
    def get(self, request: Request) -> Response:
        rows = (
            Merge.objects.visible_to(viewer_of(request))
            .select_related("recipe", "base_model")
            .order_by("-created_at", "pk")
        )
        return Response(pagination.page(request, rows, lambda row: records.merge(row, request)))

    @extend_schema(
        operation_id="merges_create",
        request=schemas.MergeRequest,
        responses={
            200: schemas.MergeRecord,
            202: schemas.MergeRecord,
            **schemas.problems(400, 403, 404, 409, 413, 415, 422),
        },
    )
    def post(self, request: Request) -> Response:
        user = require(request, "merge")
        body = body_of(request)
        start = take_start(body)
        merge, is_new = merges.register(user=user, body=body, start=start)
        return Response(records.merge(merge, request), status=202 if is_new else 200)


class MergeCheck(View):
    """POST a recipe to learn, before any work, whether it can be carried out and what it would give."""

    parser_classes = (JsonParser, *yaml_parser.PARSERS)

    @extend_schema(
        operation_id="merges_check",
        request=schemas.MergeRequest,
        responses={200: schemas.MergeCheckRecord, **schemas.problems(400, 404, 409, 413, 415, 422)},
    )
    def post(self, request: Request) -> Response:
        body = body_of(request)
        take_start(body)  # the body of a merge is taken as it is
        return Response(recipes.check(viewer=viewer_of(request), body=body))


class OneMerge(View):
    """GET one merge: state, job, report, files."""

    @extend_schema(operation_id="merges_read", responses={200: schemas.MergeRecord, **schemas.problems(404)})
    def get(self, request: Request, merge_id: str) -> Response:
        return Response(records.merge(selectors.merge(merge_id, viewer_of(request)), request))
