"""Neighbours: experts of the same base that lie near by their weights, and by the words of their cards."""

from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers as s
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import viewer_of
from api.v1 import schemas
from api.v1.base import View
from registry import selectors
from registry.errors import RevisionNotFound
from registry.services import neighbours
from registry.services.neighbours import SAME_COSINE, SAME_RATIO


class ByWeights(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    cosine = s.FloatField(help_text="Of the whole deltas, measured from the files.")
    ratio = s.FloatField(help_text="Norm of this expert's delta over that of the other one.")
    same = s.BooleanField(help_text=f"Cosine of at least {SAME_COSINE} and a ratio within {SAME_RATIO} of 1.")


class ByText(s.Serializer[Any]):
    expert = s.CharField()
    revision = s.CharField()
    score = s.FloatField(help_text="Of its card for this expert's description, as routing scores it.")


class NeighboursRecord(s.Serializer[Any]):
    state = s.ChoiceField(["ready", "pending", "none"], help_text="Of by_weights.")
    reason = s.CharField(allow_blank=True, help_text="Why there is nothing to compare.")
    by_weights = ByWeights(many=True)
    by_text = ByText(many=True)


class Neighbours(View):
    """GET the neighbours of an expert that the caller may see."""

    @extend_schema(
        operation_id="experts_neighbours",
        parameters=[OpenApiParameter("revision", str, description="A branch, a tag or a commit; main when left out.")],
        responses={200: NeighboursRecord, **schemas.problems(404)},
    )
    def get(self, request: Request, owner: str, name: str) -> Response:
        viewer = viewer_of(request)
        expert = selectors.expert(f"{owner}/{name}", viewer)
        wanted = request.query_params.get("revision")
        found = selectors.revision(selectors.Repository(expert, None), wanted) if wanted else selectors.head(expert)
        if found is None:
            raise RevisionNotFound(f"{expert.full_name} has no revision yet.")
        return Response(neighbours.of(found, viewer))
