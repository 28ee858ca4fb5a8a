"""Figures of an evaluation that cannot have been measured together are found, each with its field."""

import copy

import pytest

from api.v1.schemas import EvaluationFigures
from registry.services import evaluations
from tests.evaluated import FIGURES


def test_figures_that_were_measured_are_accepted() -> None:
    assert EvaluationFigures(data=FIGURES).is_valid()
    assert list(evaluations.contradictions(FIGURES)) == []


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"recall_5": 0.2}, "/figures/recall_5"),
        ({"recall_1": 0.5}, "/figures/recall_1"),
        ({"recall_1": None}, "/figures/recall_1"),
        ({"mrr": 0.7}, "/figures/mrr"),
        ({"mrr": 0.2}, "/figures/mrr"),
        ({"macro_recall_1": 0.25}, "/figures/macro_recall_1"),
        ({"auroc": None}, "/figures/auroc"),
        ({"out_of_scope": 0}, "/figures/let_through"),
        ({"kept": 0.0}, "/figures/recall_1_of_kept"),
        ({"in_scope": 5}, "/figures/suites"),
        ({"suites": [FIGURES["suites"][0]] * 2}, "/figures/suites"),
        ({"suites": []}, "/figures/suites"),
        ({"suites": [{**FIGURES["suites"][0], "mrr": 0.1}, FIGURES["suites"][1]]}, "/figures/suites/0/mrr"),
        ({"calibration": FIGURES["calibration"][::-1]}, "/figures/calibration"),
        ({"calibration": [{**FIGURES["calibration"][0], "right": 2}, *FIGURES["calibration"][1:]]}, "/figures/calibration"),
        ({"calibration": [{**FIGURES["calibration"][0], "right": 3}, *FIGURES["calibration"][1:]]}, "/figures/calibration/0/right"),
        ({"confusions": [{**FIGURES["confusions"][0], "queries": 5}]}, "/figures/confusions"),
                            ],
)  # fmt: skip
def test_figures_that_cannot_be_are_told_with_the_field(changes, pointer) -> None:
    found = [fault.pointer for fault in evaluations.contradictions({**copy.deepcopy(FIGURES), **changes})]
    assert pointer in found


@pytest.mark.parametrize(
    "changes",
    [
        {"recall_1": 1.5},
        {"in_scope": -1},
        {"threshold": None},
        {"texts": ["what was asked"]},
        {"confusions": FIGURES["confusions"][:1] * 21},
        {"suites": [{**FIGURES["suites"][0], "suite": "x" * 41}]},
        {"suites": [{**FIGURES["suites"][0], "suite": f"s{place}"} for place in range(65)]},
        {"calibration": [{**FIGURES["calibration"][0], "confidence": "sure"}]},
    ],
)  # fmt: skip
def test_figures_of_another_shape_are_refused(changes) -> None:
    body = EvaluationFigures(data={**FIGURES, **changes})
    assert not body.is_valid()
    assert set(body.errors) == set(changes)
