"""The question box, and what is new."""

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from frontend.views.common import page
from registry import selectors
from registry.errors import Invalid
from registry.models import BaseModel, Expert
from registry.services import routing


@page
def home(request: HttpRequest) -> HttpResponse:
    """Without JavaScript the box is a plain form that comes back here with ?q=."""
    visible = Expert.objects.visible_to(request.user).filter(yanked_at=None)
    bases = BaseModel.objects.filter(experts__in=visible).annotate(count=Count("experts")).order_by("-count", "name")
    context = {
        "newest": visible.select_related("namespace", "base_model").order_by("-created_at", "-id")[:8],
        "bases": bases[:12],
        "count": visible.count(),
        **answer(request),
    }
    return render(request, "hub/home.html", context)


@page
def ask(request: HttpRequest) -> HttpResponse:
    """The answer alone, for the page that is already there."""
    return render(request, "hub/_answer.html", answer(request))


def answer(request: HttpRequest) -> dict[str, object]:
    text = request.GET.get("q", "").strip()
    base = request.GET.get("base_model", "").strip()
    if not text:
        return {"query": "", "base": base, "answer": None}
    try:
        found = routing.route(viewer=request.user, text=text, base_model=base or None, top_k=5, explain=True)
    except Invalid as error:
        return {"query": text, "base": base, "answer": None, "error": error}
    names = [result["expert"] for result in found["results"]]
    experts = {expert.full_name: expert for expert in selectors.experts_named(names, request.user)}
    rows = [{**result, "row": experts.get(result["expert"])} for result in found["results"]]
    return {"query": text, "base": base, "answer": {**found, "rows": rows}}
