"""Where merges come from and what experts went into: as a graph for readers, and as the record beside a result."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Exists, OuterRef, QuerySet

from moerge.merging.recipe import Recipe
from registry.checks import files
from registry.models import BaseModel, File, Merge, MergeParent, Revision
from registry.selectors import Viewer

MOST_NODES = 500
BASE, EXPERT, MERGE = "base", "expert", "merge"
# From left to right, as a page draws them.
LAYERS = (BASE, EXPERT, MERGE)


@dataclass(frozen=True)
class Node:
    """A base, an expert at one revision, or a merge. `yanked` also marks a merge that has a yanked parent."""

    id: str
    kind: str
    name: str
    revision: str | None = None
    state: str | None = None
    yanked: bool = False


@dataclass(frozen=True)
class Edge:
    """What went into what; `weight` is the expert's in a merge."""

    origin: str
    target: str
    kind: str  # trained_on, merged_into
    weight: float | None = None


@dataclass
class Graph:
    """Nodes by id and edges between them; what would go beyond the bound is left out and said so."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    is_truncated: bool = False

    def add(self, *nodes: Node, edges: Iterable[Edge] = ()) -> None:
        """Take nodes that belong together, with their edges, if all of them still fit."""
        new = {node.id: node for node in nodes if node.id not in self.nodes}
        if len(self.nodes) + len(new) > MOST_NODES:
            self.is_truncated = True
            return
        self.nodes |= new
        self.edges += [edge for edge in edges if edge not in self.edges]


def of_merge(merge: Merge, viewer: Viewer) -> Graph:
    """A merge and its parents, each at the revision that is pinned; empty when the viewer may not see them all."""
    graph = Graph()
    for row in _marked(Merge.objects.visible_to(viewer).filter(pk=merge.pk)):
        _take(graph, row, _parents(MergeParent.objects.filter(merge=row)))
    return graph


def of_expert(revisions: QuerySet[Revision], viewer: Viewer) -> Graph:
    """Revisions of one expert, which the viewer may see, and the merges they went into, newest first.

    Of the merges only those appear whose every parent the viewer may see, and of their parents only these revisions.
    """
    graph = Graph()
    for revision in revisions.select_related("expert__namespace", "base_model").order_by("-id")[: MOST_NODES + 1]:
        _take_revision(graph, revision)
    children = Merge.objects.visible_to(viewer).filter(parents__revision__in=revisions).distinct()
    merges = list(_marked(children).order_by("-created_at", "pk")[: MOST_NODES + 1])
    parents: dict[str, list[MergeParent]] = {}
    for parent in _parents(MergeParent.objects.filter(merge__in=merges, revision__in=revisions)):
        parents.setdefault(parent.merge_id, []).append(parent)
    for row in merges:
        _take(graph, row, parents[row.pk])
    return graph


def layers(graph: Graph) -> tuple[tuple[Node, ...], ...]:
    """The nodes in columns from left to right: bases, experts, merges; each sorted by name, then revision."""
    return tuple(
        tuple(
            sorted(
                (node for node in graph.nodes.values() if node.kind == kind),
                key=lambda node: (node.name, node.revision or ""),
            )
        )
        for kind in LAYERS
    )


def record(merge: Merge, recipe: Recipe, *, environment: Mapping[str, Any]) -> dict[str, Any]:
    """lineage.json: what the result was made of, by digest, and where it was computed."""
    parents = list(_parents(MergeParent.objects.filter(merge=merge)))
    wanted = (files.CONFIG, files.WEIGHTS)
    rows = File.objects.filter(revision__in=[parent.revision_id for parent in parents], path__in=wanted)
    blobs = {(row.revision_id, row.path): row.blob_id for row in rows}
    statistics = {(expert.expert, expert.revision): expert.statistics for expert in recipe.experts}
    return {
        "recipe_digest": merge.recipe_id,
        "commit": merge.commit,
        "base_model": merge.base_model.name,
        "base_weights": recipe.base_weights,
        "method": recipe.method,
        "method_version": recipe.spec.version,
        "environment": dict(environment),
        "parents": [
            {
                "expert": _name(parent.revision),
                "revision": parent.revision.commit,
                "weight": parent.weight,
                "weights_sha256": blobs[parent.revision_id, files.WEIGHTS],
                "config_sha256": blobs[parent.revision_id, files.CONFIG],
                "statistics_sha256": statistics.get((_name(parent.revision), parent.revision.commit)),
            }
            for parent in parents
        ],
    }


def _parents(rows: QuerySet[MergeParent]) -> QuerySet[MergeParent]:
    return rows.select_related("revision__expert__namespace", "revision__base_model").order_by("position")


def _marked(merges: QuerySet[Merge]) -> QuerySet[Merge]:
    """Merges that know whether a parent of theirs is yanked."""
    yanked = MergeParent.objects.filter(merge=OuterRef("pk")).exclude(revision__expert__yanked_at=None)
    return merges.select_related("base_model").annotate(is_yanked=Exists(yanked))


def _take(graph: Graph, merge: Any, parents: Iterable[MergeParent]) -> None:
    """A marked merge with these of its parents, and the base of all."""
    known = list(parents)
    node = Node(merge.full_name, MERGE, merge.full_name, merge.commit, merge.state, merge.is_yanked)
    experts = [_of_revision(parent.revision) for parent in known]
    edges = [
        Edge(expert.id, node.id, "merged_into", parent.weight) for expert, parent in zip(experts, known, strict=True)
    ]
    base = _of_base(merge.base_model)
    graph.add(
        base,
        *experts,
        node,
        edges=[*edges, *(Edge(base.id, expert.id, "trained_on") for expert in experts)],
    )


def _take_revision(graph: Graph, revision: Revision) -> None:
    node = _of_revision(revision)
    if revision.base_model is None:
        graph.add(node)
        return
    base = _of_base(revision.base_model)
    graph.add(base, node, edges=[Edge(base.id, node.id, "trained_on")])


def _of_base(base: BaseModel) -> Node:
    return Node(f"base:{base.name}", BASE, base.name)


def _of_revision(revision: Revision) -> Node:
    name = _name(revision)
    is_yanked = revision.expert is not None and revision.expert.yanked_at is not None
    return Node(f"{name}@{revision.commit}", EXPERT, name, revision.commit, revision.state, is_yanked)


def _name(revision: Revision) -> str:
    assert revision.expert is not None, "a merge is no parent of a merge"
    return revision.expert.full_name
