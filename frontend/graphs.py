"""The lineage of a merge or an expert as the numbers that an SVG of the page is written from, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from django.urls import reverse

from registry.services import lineage

BOX_WIDTH, BOX_HEIGHT = 190, 44
GAP_X, GAP_Y, MARGIN = 90, 14, 4
LONGEST = 24
MOST_IN_A_LAYER = 16


@dataclass(frozen=True)
class Node:
    """One box: `kind` is base, expert or merge, `url` is empty where there is no page."""

    key: str
    title: str
    note: str
    kind: str
    url: str = ""


@dataclass(frozen=True)
class Box:
    """A node at its place, from the upper left corner; `text` is the title as long as fits."""

    node: Node
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """From the right side of one box to the left side of another, as an SVG path, with a word in its middle."""

    path: str
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Graph:
    """Everything in drawing units."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    width: int
    height: int
    description: str
    box_width: int = BOX_WIDTH
    box_height: int = BOX_HEIGHT


def of_lineage(found: lineage.Graph) -> Graph | None:
    """The drawing of a lineage; None where it would be too large to be read."""
    layers = [layer for layer in lineage.layers(found) if layer]
    if not layers or max(len(layer) for layer in layers) > MOST_IN_A_LAYER:
        return None
    edges = [(edge.origin, edge.target, "" if edge.weight is None else f"{edge.weight:g}") for edge in found.edges]
    return layered([[_node(node) for node in layer] for layer in layers], edges)


def _node(node: lineage.Node) -> Node:
    mark = ", yanked" if node.yanked else ""
    if node.kind == lineage.BASE:
        return Node(node.id, node.name, "base model", node.kind)
    if node.kind == lineage.MERGE:
        return Node(node.id, node.name, f"{node.state}{mark}", node.kind, f"/{node.name}")
    owner, _, name = node.name.partition("/")
    commit = node.revision or ""
    return Node(
        node.id, node.name, f"{commit[:12]}{mark}", node.kind, reverse("expert-tree", args=[owner, name, commit])
    )


def layered(layers: Sequence[Sequence[Node]], edges: Sequence[tuple[str, str, str]]) -> Graph:
    """Nodes by layer, each layer centred; edges are (from, to, label) by keys and may skip no layer."""
    tallest = max(len(layer) for layer in layers)
    height = tallest * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    boxes = []
    for column, layer in enumerate(layers):
        used = len(layer) * (BOX_HEIGHT + GAP_Y) - GAP_Y
        x, top = MARGIN + column * (BOX_WIDTH + GAP_X), (height - used) / 2
        boxes += [
            Box(node, x, top + place * (BOX_HEIGHT + GAP_Y), shortened(node.title)) for place, node in enumerate(layer)
        ]
    at = {box.node.key: box for box in boxes}
    lines = tuple(_line(at[start], at[end], label) for start, end, label in edges)
    names = {node.key: node.title for layer in layers for node in layer}
    told = "; ".join(f"{names[start]} to {names[end]}{f', {label}' if label else ''}" for start, end, label in edges)
    width = len(layers) * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    return Graph(tuple(boxes), lines, width, height, told)


def shortened(text: str) -> str:
    """A name that fits a box: its beginning and its end."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[: half - 1]}…{text[-half:]}"


def _line(start: Box, end: Box, label: str) -> Line:
    x1, y1 = start.x + BOX_WIDTH, start.y + BOX_HEIGHT / 2
    x2, y2 = end.x, end.y + BOX_HEIGHT / 2
    bend = (x1 + x2) / 2
    return Line(f"M{x1:g} {y1:g}C{bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}", bend, (y1 + y2) / 2 - 4, label)
