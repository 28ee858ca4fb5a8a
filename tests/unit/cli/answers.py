"""What a scripted hub answers to questions of routing: experts and scores by text."""

import json
from typing import Any

from tests.unit.client.servers import Asked, Reply, as_json

ROUTE = "/api/v1/route"
# Query -> experts with their scores, best first.
SCRIPT: dict[str, list[tuple[str, float]]] = {
    "right": [("ann/a", 0.9), ("ann/b", 0.5)],
    "tied": [("ann/b", 0.7), ("ann/a", 0.7)],
    "sixth": [("ann/a", 0.5), *((f"ann/x{place}", 0.4) for place in range(4)), ("ann/D", 0.3)],
    "absent": [("ann/a", 0.2)],
    "strange": [("ann/a", 0.35)],
    "stranger": [("ann/b", 0.2)],
}


def band(score: float) -> str:
    return "high" if score >= 0.6 else "medium" if score >= 0.4 else "low"


def answer(text: str, *, degraded: bool = False) -> dict[str, Any]:
    hits = SCRIPT.get(text, [("ann/a", 0.9)])
    results = [{"expert": name, "score": score, "confidence": band(score), "parts": {}} for name, score in hits]
    return {
        "results": results, "abstained": False, "best_score": hits[0][1], "min_score": 0.0, "default_min_score": 0.3,
        "strategy": "hybrid", "degraded": degraded,
    }  # fmt: skip


def routing(asked: Asked) -> Reply:
    texts = json.loads(asked.body)["texts"]
    return as_json({"answers": [answer(text) for text in texts], "index_seq": 12, "embedding_model": "e"})
