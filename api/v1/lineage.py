"""Lineage: what a merge was made of, and what an expert went into."""

from dataclasses import asdict
from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers as s
from rest_framework.request import Request
from rest_framework.response import Response

from api.authentication import viewer_of
from api.v1 import schemas
from api.v1.base import View
from registry import selectors
from registry.models import Revision
from registry.services import lineage
from registry.services.lineage import Graph


class LineageNode(s.Serializer[Any]):
    id = s.CharField()
    kind = s.ChoiceField(lineage.LAYERS)
    name = s.CharField()
    revision = s.CharField(allow_null=True, help_text="The commit, of an expert the one that is pinned.")
    state = s.CharField(allow_null=True)
    yanked = s.BooleanField(help_text="Of a merge: whether a parent of it is yanked.")


class LineageEdge(s.Serializer[Any]):
    origin = s.CharField()
    target = s.CharField()
    kind = s.ChoiceField(["trained_on", "merged_into"])
    weight = s.FloatField(allow_null=True)


class LineageRecord(s.Serializer[Any]):
    nodes = LineageNode(many=True)
    edges = LineageEdge(many=True)
    truncated = s.BooleanField(help_text=f"Whether there is more than {lineage.MOST_NODES} nodes.")


def told(graph: Graph) -> dict[str, Any]:
    """A graph as a record."""
    return {
        "nodes": [asdict(node) for node in graph.nodes.values()],
        "edges": [asdict(edge) for edge in graph.edges],
        "truncated": graph.is_truncated,
    }


class MergeLineage(View):
    """GET the parents of a merge, each at the revision that is pinned."""

    @extend_schema(operation_id="merges_lineage", responses={200: LineageRecord, **schemas.problems(404)})
    def get(self, request: Request, merge_id: str) -> Response:
        viewer = viewer_of(request)
        return Response(told(lineage.of_merge(selectors.merge(merge_id, viewer), viewer)))


class ExpertLineage(View):
    """GET the merges that an expert went into, at one revision or at any."""

    @extend_schema(
        operation_id="experts_lineage",
        parameters=[OpenApiParameter("revision", str, description="A branch, a tag or a commit; all when left out.")],
        responses={200: LineageRecord, **schemas.problems(404)},
    )
    def get(self, request: Request, owner: str, name: str) -> Response:
        viewer = viewer_of(request)
        expert = selectors.expert(f"{owner}/{name}", viewer)
        rows = Revision.objects.filter(expert=expert, derived_from=None)
        if wanted := request.query_params.get("revision"):
            found = selectors.revision(selectors.Repository(expert, None), wanted)
            rows = rows.filter(pk__in=[found.pk, found.derived_from_id])
        return Response(told(lineage.of_expert(rows, viewer)))
