"""An evaluation of six queries, worked by hand, as `moerge eval-router` tells it."""

from typing import Any

# Ranks 1, 2 and 6 in one suite, none in the other; two queries that no expert fits.
FIGURES: dict[str, Any] = {
    "in_scope": 4, "out_of_scope": 2,
    "recall_1": 0.25, "recall_5": 0.5, "recall_10": 0.75, "mrr": 5 / 12,
    "macro_recall_1": 1 / 6, "macro_recall_5": 1 / 3, "macro_recall_10": 0.5,
    "auroc": 0.8125, "threshold": 0.3, "kept": 0.75, "recall_1_of_kept": 1 / 3, "let_through": 0.5,
    "suites": [
        {"suite": "first", "queries": 3, "recall_1": 1 / 3, "recall_5": 2 / 3, "recall_10": 1.0, "mrr": 5 / 9},
        {"suite": "second", "queries": 1, "recall_1": 0.0, "recall_5": 0.0, "recall_10": 0.0, "mrr": 0.0},
    ],
    "calibration": [
        {"confidence": "high", "in_scope": 2, "right": 1, "out_of_scope": 0},
        {"confidence": "medium", "in_scope": 1, "right": 0, "out_of_scope": 0},
        {"confidence": "low", "in_scope": 1, "right": 0, "out_of_scope": 2},
    ],
    "confusions": [
        {"gold": "carl/secret", "found": "ann/tea", "queries": 1},
        {"gold": "Ann/Cake", "found": "ann/tea", "queries": 1},
        {"gold": "ann/no-such", "found": "ann/tea", "queries": 1},
    ],
}  # fmt: skip
