"""The drawing of a lineage: every node at its place, every edge from side to side, names that fit."""

from frontend import graphs
from frontend.graphs import Node
from registry.services import lineage

BASE = Node("b", "owner/base", "base model", "base")
FIRST = Node("1", "ann/first", "lora 4", "expert", "/ann/first")
SECOND = Node("2", "ben/an-expert-with-a-name-that-does-not-fit", "lora 8", "expert", "/ben/x")
MERGE = Node("m", "merges/0123", "ties, ready", "merge")
EDGES = [("b", "1", ""), ("b", "2", ""), ("1", "m", "0.7"), ("2", "m", "-0.3")]


def test_layers_stand_beside_each_other_and_each_is_centred() -> None:
    graph = graphs.layered([[BASE], [FIRST, SECOND], [MERGE]], EDGES)
    at = {box.node.key: (box.x, box.y) for box in graph.boxes}
    assert at["1"][0] == at["2"][0] == at["b"][0] + graphs.BOX_WIDTH + graphs.GAP_X
    assert at["m"][0] == at["1"][0] + graphs.BOX_WIDTH + graphs.GAP_X
    assert at["2"][1] - at["1"][1] == graphs.BOX_HEIGHT + graphs.GAP_Y
    assert at["b"][1] == at["m"][1] == (at["1"][1] + at["2"][1]) / 2
    assert all(0 <= box.x <= graph.width - graph.box_width for box in graph.boxes)
    assert all(0 <= box.y <= graph.height - graph.box_height for box in graph.boxes)


def test_an_edge_leaves_at_the_right_and_arrives_at_the_left_with_its_weight() -> None:
    graph = graphs.layered([[BASE], [FIRST, SECOND], [MERGE]], EDGES)
    boxes = {box.node.key: box for box in graph.boxes}
    line = graph.lines[3]
    assert line.label == "-0.3"
    second, merge = boxes["2"], boxes["m"]
    assert line.path.startswith(f"M{second.x + graphs.BOX_WIDTH:g} {second.y + graphs.BOX_HEIGHT / 2:g}C")
    assert line.path.endswith(f" {merge.x:g} {merge.y + graphs.BOX_HEIGHT / 2:g}")
    assert "ben/an-expert-with-a-name-that-does-not-fit to merges/0123, -0.3" in graph.description


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    assert graphs.shortened("ann/first") == "ann/first"
    short = graphs.shortened(SECOND.title)
    assert (len(short), short[:4], short[-3:]) == (graphs.LONGEST, "ben/", "fit")


def test_a_lineage_is_drawn_with_links_weights_and_marks_and_left_out_when_it_is_too_large() -> None:
    found = lineage.Graph()
    base = lineage.Node("base:o/b", lineage.BASE, "o/b")
    expert = lineage.Node("ann/x@" + "a" * 40, lineage.EXPERT, "ann/x", "a" * 40, "ready", yanked=True)
    merge = lineage.Node("merges/1", lineage.MERGE, "merges/1", "b" * 40, "ready")
    edges = [lineage.Edge(base.id, expert.id, "trained_on"), lineage.Edge(expert.id, merge.id, "merged_into", -0.25)]
    found.add(base, expert, merge, edges=edges)
    graph = graphs.of_lineage(found)
    assert graph is not None
    told = [(box.node.url, box.node.note) for box in graph.boxes]
    assert told == [("", "base model"), (f"/ann/x/tree/{'a' * 40}", "aaaaaaaaaaaa, yanked"), ("/merges/1", "ready")]
    assert [line.label for line in graph.lines] == ["", "-0.25"]
    for number in range(graphs.MOST_IN_A_LAYER):
        found.add(lineage.Node(f"merges/m{number}", lineage.MERGE, f"merges/m{number}", "c" * 40, "ready"))
    assert graphs.of_lineage(found) is None
    assert graphs.of_lineage(lineage.Graph()) is None
