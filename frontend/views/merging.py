"""The merge form, and a merge while it is made and after."""

import json
from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from frontend.views.common import page
from registry import selectors
from registry.errors import HubError
from registry.models import Expert, Job, Merge, Method, Revision, User
from registry.services import merges

SHOWN_AT_ONCE = 100


@login_required
@page
def builder(request: HttpRequest) -> HttpResponse:
    """Choose experts and a method; POST registers the recipe and goes to its page."""
    assert isinstance(request.user, User)
    error: HubError | None = None
    if request.method == "POST":
        try:
            merge, _ = merges.register(user=request.user, body=recipe_of(request))
            return redirect("merge-result", merge_id=merge.pk)
        except HubError as failure:
            error = failure
    source = request.POST if request.method == "POST" else request.GET
    chosen = source.getlist("expert")
    base = source.get("base_model", "")
    heads = selectors.routable().filter(expert__in=Expert.objects.visible_to(request.user))
    bases = sorted({name for name in heads.values_list("base_model__name", flat=True) if name})
    if not base and chosen:
        base = heads.filter(expert__in=selectors.experts_named(chosen, request.user)).values_list(
            "base_model__name", flat=True
        ).first() or ""  # fmt: skip
    base = base or (bases[0] if bases else "")
    rows = heads.filter(base_model__name=base).select_related("expert__namespace").order_by("expert__name")
    context = {
        "bases": bases,
        "base": base,
        "rows": [
            {
                "revision": row,
                "expert": row.expert,
                "is_chosen": row.expert.full_name in chosen,
                "weight": source.get(f"weight:{row.expert.full_name}", "0.5"),
            }
            for row in rows[:SHOWN_AT_ONCE]
            if row.expert
        ],
        # Statistics and losses cannot be given here, so what needs them is left out.
        "methods": Method.objects.filter(family=Method.Family.MERGE, spec__needs=[]),
        "method": source.get("method", "linear"),
        "values": source,
        "error": error,
    }
    return render(request, "hub/merge_form.html", context, status=error.status if error else 200)


def recipe_of(request: HttpRequest) -> dict[str, Any]:
    """The form as the body that POST /api/v1/merges takes; the recipe's own rules judge it."""
    method = request.POST.get("method", "")
    prefix = f"parameter:{method}:"
    parameters = {
        name.removeprefix(prefix): typed(text)
        for name, text in request.POST.items()
        if name.startswith(prefix) and isinstance(text, str) and text.strip() != ""
    }
    body: dict[str, Any] = {
        "base_model": request.POST.get("base_model") or None,
        "method": method,
        "parameters": parameters,
        "experts": [
            {"expert": name, "weight": typed(request.POST.get(f"weight:{name}", "1"))}
            for name in request.POST.getlist("expert")
        ],
    }
    if rank := request.POST.get("rank", "").strip():
        body["output"] = {"kind": "lora", "rank": typed(rank)}
    if seed := request.POST.get("seed", "").strip():
        body["seed"] = typed(seed)
    return body


def typed(text: str) -> Any:
    """A form value as JSON would write it: numbers and true or false, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


@page
def merge(request: HttpRequest, merge_id: str) -> HttpResponse:
    return render(request, "hub/merge.html", context_of(request, merge_id))


@page
def status(request: HttpRequest, merge_id: str) -> HttpResponse:
    return render(request, "hub/_merge_status.html", context_of(request, merge_id))


def context_of(request: HttpRequest, merge_id: str) -> dict[str, Any]:
    found = selectors.merge(merge_id, request.user)
    revision = Revision.objects.filter(merge=found).first()
    job = found.jobs.order_by("-created_at").first()
    return {
        "merge": found,
        "recipe": json.dumps(json.loads(found.recipe.canonical), indent=2),
        "parents": found.parents.select_related("revision__expert__namespace"),
        "revision": revision,
        "files": revision.files.select_related("blob") if revision else [],
        "job": job,
        "is_moving": found.state in {Merge.State.QUEUED, Merge.State.RUNNING}
        or (job is not None and job.state not in Job.FINISHED),
        "endpoint": request.build_absolute_uri("/").rstrip("/"),
    }
