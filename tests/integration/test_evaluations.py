"""Evaluations of routing: what is kept, what is refused, and that confusions name nobody's hidden experts."""

import copy
from typing import Any

import pytest

from registry.models import AuditEvent, Expert, RoutingClock, RoutingEvaluation
from registry.services import catalogues, evaluations
from tests.evaluated import FIGURES
from tests.integration import hf
from tests.integration.routables import expert

pytestmark = pytest.mark.django_db
PATH = "/api/v1/routing/evaluations"


@pytest.fixture
def carl() -> hf.Caller:
    """Who measured, with the catalogue and three experts, one of them his own and hidden."""
    catalogues.sync()
    carl = hf.person("carl")[1]
    RoutingClock.objects.create(pk=1, seq=12)
    expert("ann/tea", "Tea.")
    expert("ann/cake", "Cake.")
    expert("carl/secret", "Hidden.", private=True)
    return carl


def body(**changes: Any) -> dict[str, Any]:
    """A request; `changes` are figures by name, or `about` with other fields."""
    figures = copy.deepcopy(FIGURES)
    about = changes.pop("about", {})
    return {"base_model": "Base/One", "strategy": "hybrid", "index_seq": 12, "figures": {**figures, **changes}, **about}


def test_what_was_measured_is_kept_and_told_to_everybody(carl) -> None:
    answer = carl.json("POST", PATH, body())
    assert answer.status_code == 201, answer.body
    (item,) = hf.Caller().get(PATH).json()["items"]
    assert {name: item[name] for name in ("base_model", "strategy", "index_seq", "created_by")} == {
        "base_model": "base/one", "strategy": "hybrid", "index_seq": 12, "created_by": "carl",
    }  # fmt: skip
    kept = item["figures"]
    assert {name: kept[name] for name in FIGURES if name != "confusions"} == {
        name: FIGURES[name] for name in FIGURES if name != "confusions"
    }
    assert AuditEvent.objects.filter(action="evaluation.publish", actor__username="carl").count() == 1


def test_confusions_name_only_experts_that_the_reader_may_see_now(carl) -> None:
    told = carl.json("POST", PATH, body()).json()
    everything = [("carl/secret", "ann/tea"), ("ann/cake", "ann/tea")]

    def pairs(caller: hf.Caller) -> list[tuple[str, str]]:
        answer = caller.get(PATH)
        if caller is not carl:
            assert b"secret" not in answer.body
        return [(pair["gold"], pair["found"]) for pair in answer.json()["items"][0]["figures"]["confusions"]]

    assert [(pair["gold"], pair["found"]) for pair in told["figures"]["confusions"]] == everything
    assert pairs(carl) == everything
    assert pairs(hf.Caller()) == pairs(hf.person("dora", ["read"])[1]) == everything[1:]
    # A key without scope read sees what everybody sees.
    assert pairs(hf.person("eve", ["write"])[1]) == everything[1:]
    Expert.objects.filter(name="cake").update(name="pie", key="pie")
    assert pairs(hf.Caller()) == [("ann/pie", "ann/tea")]
    Expert.objects.filter(name="tea").update(visibility="private")
    assert pairs(hf.Caller()) == []
    row = RoutingEvaluation.objects.get()
    assert "secret" not in str(row.figures)


def test_a_name_that_the_publisher_may_not_see_is_not_told_apart_from_none(carl) -> None:
    dora = hf.person("dora", ["read", "write"])[1]
    assert dora.json("POST", PATH, body()).status_code == 201
    ids = RoutingEvaluation.objects.get().figures["confusions"]
    assert [(pair["gold"], pair["queries"]) for pair in ids] == [(Expert.objects.get(name="cake").pk, 1)]


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"recall_1": 0.5}, "/figures/recall_1"),
        ({"texts": ["what was asked"]}, "/figures/texts"),
        ({"about": {"strategy": "magic"}}, "/strategy"),
        ({"about": {"index_seq": 13}}, "/index_seq"),
        ({"about": {"base_model": "base/none"}}, "/base_model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_field(carl, changes, pointer) -> None:
    answer = carl.json("POST", PATH, body(**changes))
    assert answer.status_code == 422, answer.body
    assert pointer in [fault["pointer"] for fault in answer.json()["errors"]]
    assert RoutingEvaluation.objects.count() == 0


def test_figures_without_queries_of_a_kind_are_null(carl) -> None:
    without = {
        "out_of_scope": 0, "auroc": None, "let_through": None,
        "calibration": [{**band, "out_of_scope": 0} for band in FIGURES["calibration"]],
    }  # fmt: skip
    assert carl.json("POST", PATH, body(**without)).status_code == 201
    nothing = {name: None for name, value in FIGURES.items() if isinstance(value, float) and name != "threshold"}
    strange = {
        **nothing, "let_through": 0.5, "in_scope": 0, "suites": [], "confusions": [],
        "calibration": [{**band, "in_scope": 0, "right": 0} for band in FIGURES["calibration"]],
    }  # fmt: skip
    assert carl.json("POST", PATH, body(**strange)).status_code == 201
    empty = {**strange, "out_of_scope": 0, "let_through": None}
    assert carl.json("POST", PATH, body(**empty)).status_code == 422


def test_the_same_evaluation_sent_again_is_kept_once(carl) -> None:
    first = carl.json("POST", PATH, body())
    again = carl.json("POST", PATH, body())
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert carl.json("POST", PATH, body(about={"strategy": "bm25"})).status_code == 201
    assert RoutingEvaluation.objects.count() == 2


def test_old_evaluations_of_the_same_kind_make_place(carl, monkeypatch) -> None:
    monkeypatch.setattr(evaluations, "KEPT", 2)
    carl.json("POST", PATH, body(about={"strategy": "bm25"}))
    for kept in (0.5, 0.25, 1.0):
        assert carl.json("POST", PATH, body(kept=kept)).status_code == 201
    rows = hf.Caller().get(PATH).json()["items"]
    assert [(row["strategy"], row["figures"]["kept"]) for row in rows] == [
        ("hybrid", 1.0),
        ("hybrid", 0.25),
        ("bm25", 0.75),
    ]


def test_lists_can_be_narrowed_to_a_base_and_a_strategy(carl) -> None:
    expert("ann/two", base="base/two")
    carl.json("POST", PATH, body())
    carl.json("POST", PATH, body(about={"base_model": "base/two", "strategy": "bm25"}))
    carl.json("POST", PATH, body(about={"base_model": None}))

    def found(query: str) -> list[tuple[str | None, str]]:
        return [(row["base_model"], row["strategy"]) for row in hf.Caller().get(PATH + query).json()["items"]]

    assert found("") == [(None, "hybrid"), ("base/two", "bm25"), ("base/one", "hybrid")]
    assert found("?base_model=base/two") == [("base/two", "bm25")]
    assert found("?strategy=hybrid&limit=1") == [(None, "hybrid")]
    assert hf.Caller().get(f"{PATH}?base_model=base/none").status_code == 422


def test_only_a_key_with_scope_write_publishes(carl) -> None:
    assert hf.Caller().json("POST", PATH, body()).status_code == 401
    assert hf.person("dora", ["read"])[1].json("POST", PATH, body()).status_code == 403
    assert RoutingEvaluation.objects.count() == 0
