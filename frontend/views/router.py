"""The router page: queries in, a table with all that decided out, and what was measured of the router."""

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlencode

from django.db.models import Count
from django.http import HttpRequest, HttpResponse, QueryDict
from django.shortcuts import render
from django.urls import reverse
from django.utils.http import content_disposition_header

from frontend import bars
from frontend.templatetags.hub import PARTS
from frontend.views.common import page
from registry import selectors
from registry.errors import BaseUnknown, Fault, HubError, RequestInvalid
from registry.models import BaseModel, Expert, Method
from registry.selectors import Viewer
from registry.services import evaluations, routing

TOP_K = 10
FIELDS = ("base_model", "strategy", "top_k", "min_score", "owner", "tag", "licence")
CSV_COLUMNS = (
    "text", "expert", "score", "confidence", "second", "second_score", "abstained", "best_score", "min_score",
)  # fmt: skip
# A table program takes a cell that begins so for a formula, and cells hold what anybody may have written.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
# Addresses beyond this are refused by servers and proxies on the way.
LONGEST_ADDRESS = 3500


@dataclass(frozen=True, kw_only=True)
class Question:
    """The form as it was filled in, all of it text."""

    text: str
    is_batch: bool
    base_model: str
    strategy: str
    top_k: str
    min_score: str
    owner: str
    tag: str
    licence: str

    @classmethod
    def of(cls, query: QueryDict) -> Self:
        given = {name: query.get(name, "").replace("\0", "").strip() for name in FIELDS}
        text = query.get("q", "").replace("\0", "").replace("\r\n", "\n").strip()
        return cls(text=text, is_batch=bool(query.get("lines")), **given)

    @property
    def lines(self) -> list[str]:
        """The texts of a batch: every line with a visible character."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    def body(self) -> dict[str, Any]:
        """What POST /api/v1/route takes. Raises RequestInvalid for a number that is none."""
        tags = [tag for tag in self.tag.replace(",", " ").split() if tag]
        filters = {"owner": self.owner, "tags": tags, "licence": self.licence}
        given = {
            "base_model": self.base_model,
            "strategy": self.strategy,
            "filters": {name: value for name, value in filters.items() if value},
        }
        body: dict[str, Any] = {"texts": self.lines} if self.is_batch else {"text": self.text}
        body |= {name: value for name, value in given.items() if value}
        body["top_k"] = _whole(self.top_k)
        if self.min_score:
            body["min_score"] = _share(self.min_score)
        return body | {"explain": True}

    @property
    def fields(self) -> dict[str, str]:
        """The fields of the form that were filled in."""
        batch = "on" if self.is_batch else ""
        given = {"q": self.text, "lines": batch, **{name: getattr(self, name) for name in FIELDS}}
        return {name: value for name, value in given.items() if value}

    def address(self, **changes: str) -> str:
        """The query string that fills the form in like this."""
        return urlencode({**self.fields, **changes})


def _whole(text: str) -> int:
    if not text:
        return TOP_K
    if not (text.isascii() and text.isdigit() and len(text) < 4):
        fault = Fault("/top_k", text[:40], f"1 to {routing.MAX_RESULTS}", "Leave it empty for ten.")
        raise RequestInvalid("The number of experts is not one.", faults=[fault])
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        fault = Fault("/min_score", text[:40], "a number from 0 to 1", "Leave it empty for the hub's own threshold.")
        raise RequestInvalid("The threshold is out of range.", faults=[fault])
    return value


@page
def router(request: HttpRequest) -> HttpResponse:
    """All of the state is in the address; without JavaScript the form comes back here."""
    question = Question.of(request.GET)
    visible = Expert.objects.visible_to(request.user).filter(yanked_at=None)
    known = BaseModel.objects.filter(experts__in=visible).annotate(count=Count("experts")).order_by("-count", "name")
    found = answer(request, question)
    context = {
        **found,
        "bases": known,
        "strategies": Method.objects.filter(family=Method.Family.STRATEGY).order_by("name"),
        "most_texts": routing.MAX_TEXTS,
        "most_results": routing.MAX_RESULTS,
        **measured(question.base_model, request.user),
    }
    error = found["error"]
    response = render(request, "hub/router.html", context, status=error.status if error else 200)
    if error and error.retry_after_seconds is not None:
        response["Retry-After"] = str(error.retry_after_seconds)
    return response


@page
def ask(request: HttpRequest) -> HttpResponse:
    """The answer alone, for the page that is already there; a refusal is shown in the same place."""
    question = Question.of(request.POST if request.method == "POST" else request.GET)
    response = render(request, "hub/_router_answer.html", answer(request, question))
    address = f"{reverse('router')}?{question.address()}"
    if len(address) <= LONGEST_ADDRESS:
        response["HX-Replace-Url"] = address
    return response


@page
def download(request: HttpRequest) -> HttpResponse:
    """The answers to a batch as CSV or JSON lines; a batch too long for an address is posted."""
    given = request.POST if request.method == "POST" else request.GET
    question = Question.of(given)
    kind = given.get("format", "csv")
    if kind not in {"csv", "jsonl"}:
        fault = Fault("?format", kind[:40], ["csv", "jsonl"], "Choose one of these.")
        raise RequestInvalid("This format is not known.", faults=[fault])
    body = {**question.body(), "texts": question.lines}
    body.pop("text", None)
    rows = list(rows_of(body["texts"], routing.route(viewer=request.user, **body)["answers"]))
    text = _csv(rows) if kind == "csv" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    media_type = "text/csv" if kind == "csv" else "application/x-ndjson"
    headers = {
        "Content-Disposition": content_disposition_header(as_attachment=True, filename=f"routed.{kind}") or "",
        "Cache-Control": "private, no-store",
    }
    return HttpResponse(text, content_type=f"{media_type}; charset=utf-8", headers=headers)


def rows_of(texts: list[str], answers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each line: its best expert and the second best."""
    for text, answer in zip(texts, answers, strict=True):
        results: list[dict[str, Any]] = [*answer["results"], {}, {}]
        first, second = results[:2]
        yield {
            "text": text,
            "expert": first.get("expert"),
            "score": first.get("score"),
            "confidence": first.get("confidence"),
            "second": second.get("expert"),
            "second_score": second.get("score"),
            **{name: answer[name] for name in ("abstained", "best_score", "min_score")},
        }


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS)
    writer.writeheader()
    for row in rows:
        is_formula = row["text"].startswith(FORMULA_STARTS)
        writer.writerow({**row, "text": f"'{row['text']}" if is_formula else row["text"]})
    return out.getvalue()


def answer(request: HttpRequest, question: Question) -> dict[str, Any]:
    """What `hub/_router_answer.html` shows."""
    context: dict[str, Any] = {"question": question, "answer": None, "batch": None, "error": None}
    if not question.text:
        return context
    try:
        body = question.body()
        context["call"] = curl(request, body)
        found = routing.route(viewer=request.user, **body)
    except HubError as error:
        context["error"] = error
        return context
    context["about"] = found
    if question.is_batch:
        context["batch"] = list(rows_of(body["texts"], found["answers"]))
        context["degraded"] = any(one["degraded"] for one in found["answers"])
        context["default_min_score"] = found["answers"][0]["default_min_score"]
        return context
    experts = {
        expert.full_name: expert
        for expert in selectors.experts_named([result["expert"] for result in found["results"]], request.user)
    }
    results = [{**result, "row": experts.get(result["expert"])} for result in found["results"]]
    return context | {
        "answer": found,
        "degraded": found["degraded"],
        "default_min_score": found["default_min_score"],
        "results": results,
        "parts": sorted({name for result in results for name in result["parts"]}, key=_place),
        "lower": question.address(min_score="0"),
    }


def _place(name: str) -> tuple[int, str]:
    """Parts in the order in which they are explained, others after them."""
    return (list(PARTS).index(name) if name in PARTS else len(PARTS)), name


def curl(request: HttpRequest, body: dict[str, Any]) -> str:
    """The same question as a command of a shell."""
    key = ' -H "Authorization: Bearer $HF_TOKEN"' if request.user.is_authenticated else ""
    address = request.build_absolute_uri("/api/v1/route")
    return (
        f"curl -s {shlex.quote(address)}{key} \\\n  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def measured(base_model: str, viewer: Viewer) -> dict[str, Any]:
    """The last evaluation, of this base where there is one."""
    try:
        last = evaluations.last(base_model=base_model).first()
    except BaseUnknown:
        last = None
    if last is None:
        return {"evaluation": None}
    figures = evaluations.told(last, viewer)
    names = {"R@1": "recall_1", "R@5": "recall_5", "R@10": "recall_10", "MRR": "mrr", "AUROC": "auroc"}
    return {
        "evaluation": last,
        "figures": figures,
        "chart": bars.chart([(name, figures[field]) for name, field in names.items()]),
        "bands": [
            {**band, "share": band["right"] / band["in_scope"] if band["in_scope"] else None}
            for band in figures["calibration"]
        ],
    }
