"""The figures of the routing benchmark on rankings whose figures are known, and one whole run on three cards."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import routing
from moerge.routing.state import Hit


def hits(*pairs):
    return tuple(
        Hit(
            expert=expert,
            number=0,
            revision=0,
            base_model="b",
            score=score,
            confidence="low",
            parts={},
            matched_example_index=None,
        )
        for expert, score in pairs
    )


def question(gold, suite="s", number=0):
    return routing.Question(id=number, text="q", gold=gold, suite=suite)


def test_equal_scores_count_against_the_gold_expert():
    ranking = hits(("a", 0.9), ("b", 0.5), ("c", 0.5), ("d", 0.1))
    assert [routing.rank_of({name}, ranking) for name in "abcdz"] == [1, 3, 3, 4, float("inf")]
    assert routing.rank_of({"d", "b"}, ranking) == 3


def test_the_share_of_ordered_pairs_counts_equal_scores_half():
    # Pairs: .9 beats both, .5 beats .2 and ties with .5, .1 beats none: 3.5 of 6.
    assert routing.auroc([0.9, 0.5, 0.1], [0.2, 0.5]) == pytest.approx(3.5 / 6)


def test_figures_of_a_small_run_equal_those_counted_by_hand():
    ranking = hits(("a", 0.9), ("b", 0.5), ("c", 0.1))
    questions = [question("a", "one"), question("b", "one"), question("c", "two"), question("z", "two"), question(None)]
    met = routing.quality(questions, [ranking] * 4 + [hits(("a", 0.3))], {"b": {"a"}})
    assert met["micro R@1"] == 1 / 4
    assert met["micro R@5"] == 3 / 4
    assert met["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert met["macro R@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert met["macro R@5"] == pytest.approx((1 + 1 / 2) / 2)
    assert met["relaxed R@1"] == 2 / 4
    assert (met["R@1 one"], met["R@1 two"]) == (1 / 2, 0)
    assert met["AUROC"] == 1.0


def firsts(*triples):
    best, inside, right = zip(*triples, strict=True)
    return routing.Firsts(best=np.array(best), inside=np.array(inside), right=np.array(right))


def test_a_first_is_right_when_its_expert_is_first_alone():
    met = routing.Firsts.of(
        [question("a"), question("b"), question("a"), question(None), question("z")],
        [
            hits(("a", 0.9), ("b", 0.5)),
            hits(("a", 0.8), ("b", 0.5)),
            hits(("a", 0.4), ("b", 0.4)),
            hits(("a", 0.2)),
            (),
        ],
    )
    assert met.best.tolist() == [0.9, 0.8, 0.4, 0.2, 0.0]
    assert met.inside.tolist() == [True, True, True, False, True]
    assert met.right.tolist() == [True, False, False, False, False]


def test_halves_are_of_equal_size_in_every_suite_and_differ_between_splits():
    questions = [question("a", "one")] * 10 + [question("b", "two")] * 7
    made = routing.halves(questions, count=3)
    assert [(half[:10].sum(), half[10:].sum()) for half in made] == [(5, 3)] * 3
    assert len({half.tobytes() for half in made}) == 3
    assert [half.tobytes() for half in routing.halves(questions, count=3)] == [half.tobytes() for half in made]


def test_thresholds_equal_those_counted_by_hand():
    # 86 % of 10 queries are 9, of which the lowest scores .20; from .60 on all of 3 are right, from .55 on 3 of 4;
    # from .40 to .59 two of three are right, from .35 on two of four.
    made = firsts(
        (0.10, True, False), (0.20, True, False), (0.25, True, False), (0.35, True, False), (0.40, True, True),
        (0.50, True, True), (0.55, True, False), (0.60, True, True), (0.70, True, True), (0.90, True, True),
        (0.99, False, False),
    )  # fmt: skip
    assert routing.thresholds(made) == {"min_score": 0.20, "medium": 0.36, "high": 0.56}


def test_bands_tell_the_share_that_is_right_and_the_share_of_all():
    spec = routing.catalogue()["hybrid"].SPEC
    made = firsts(
        (spec.high, True, True), (spec.high + 0.1, True, False), (spec.medium, True, True), (spec.min_score, True, False),
        (0.0, True, False), (0.0, False, False), (spec.min_score, False, False),
    )  # fmt: skip
    met = routing.bands(made, spec, expert_count=669)
    assert {name: met[f"{name}: R@1"] for name in ("high", "medium", "low", "none")} == {
        "high": 0.5, "medium": 1.0, "low": 0.0, "none": 0.0,
    }  # fmt: skip
    assert [met[f"{name}: of queries with an expert"] for name in ("high", "medium", "low", "none")] == [
        0.4,
        0.2,
        0.2,
        0.2,
    ]
    assert [met[f"{name}: of queries without"] for name in ("high", "medium", "low", "none")] == [0, 0, 0.5, 0.5]


def test_a_whole_run_ranks_three_cards_and_writes_its_predictions(tmp_path):
    def lines(name, *records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    experts = lines(
        "experts",
        {"id": "travel", "name": "travel", "description": "Books trips.", "examples": ["book a flight to Rome"]},
        {"id": "kitchen", "name": "kitchen", "description": "Helps to cook.", "examples": ["how long to boil an egg"]},
    )
    distractors = lines("distractors", {"id": "bank", "name": "bank", "description": "Money matters."})
    queries = lines(
        "queries",
        {"q": "reserve a plane ticket", "gold": "travel", "suite": "x"},
        {"id": "second", "q": "cook rice", "gold": "kitchen", "suite": "x"},
        {"q": "zzz", "gold": None, "suite": "oos"},
    )
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    out = tmp_path / "predictions"
    arguments = [
        "--experts",
        experts,
        "--distractors",
        distractors,
        "--queries",
        queries,
        "--predictions",
        str(out),
        "--splits",
        "2",
    ]
    rows = {row["name"]: row for row in routing.run(parser.parse_args(arguments))}
    assert rows["micro R@1"]["value"] == 1.0
    assert rows["micro R@1"]["met"] is True
    assert set(rows["MRR"]) == {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "met"}
    assert rows["split 2, micro R@1"]["value"] == 1.0
    assert rows["same first, dense and hybrid"]["value"] == 1.0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in written] == [0, "second", 2]
    assert written[0]["ranked"][0] == "travel"
    assert sorted(written[1]["ranked"]) == ["bank", "kitchen", "travel"]
    assert written[1]["scores"] == sorted(written[1]["scores"], reverse=True)


@pytest.mark.parametrize(
    ("queries", "complaint"),
    [('{"text": "x"}', "line 1: no field 'q'"), ("[1]", "no field 'q'"), ('{"q": "x"}', "no query has a gold")],
)
def test_files_of_another_shape_are_refused_with_their_line(tmp_path, queries, complaint):
    for name, text in (("experts", '{"id": "a", "name": "a"}'), ("queries", queries)):
        (tmp_path / name).write_text(text)
    parser = argparse.ArgumentParser()
    routing.add_arguments(parser)
    arguments = parser.parse_args(["--experts", str(tmp_path / "experts"), "--queries", str(tmp_path / "queries")])
    with pytest.raises(ValueError, match=complaint):
        routing.run(arguments)
