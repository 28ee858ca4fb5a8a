"""The merge form with its check, and a merge while it is made and after."""

import json
from itertools import combinations
from typing import Any
from urllib.parse import urlencode

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from frontend import graphs
from frontend.views.common import page
from moerge.merging.recipe import DTYPES
from registry import jobs, selectors
from registry.errors import HubError, NotAllowed
from registry.models import Expert, Job, Merge, MergeParent, Method, Revision, User
from registry.services import kinship, lineage, merges, recipes

SHOWN_AT_ONCE = 100
WEAKEST = 10
TRUTHS = ("true", "false")
KINDS = (
    ("lora", "LoRA, loads in PEFT and vLLM"),
    ("ia3", "IA3, of IA3 experts"),
    ("delta", "dense task vector, nothing lost"),
    ("ternary", "ternary task vector, small"),
    ("full", "full weights of the base with the delta added"),
)


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
        "methods": [_with_values(row, source) for row in Method.objects.filter(family=Method.Family.MERGE)],
        "method": source.get("method", "linear"),
        "kinds": KINDS,
        "dtypes": DTYPES,
        "truths": TRUTHS,
        "values": source,
        "error": error,
    }
    return render(request, "hub/merge_form.html", context, status=error.status if error else 200)


def _with_values(row: Method, source: Any) -> Method:
    """A method whose parameters have what the form was sent with, for showing it again."""
    for parameter in row.spec["parameters"]:
        parameter["value"] = source.get(f"parameter:{row.name}:{parameter['name']}", "")
    return row


@login_required
@require_POST
@page
def check(request: HttpRequest) -> HttpResponse:
    """What the form would give, as a part of its page; a refusal is shown in the same place."""
    context: dict[str, Any] = {"check": None, "error": None}
    if request.POST.getlist("expert"):
        body = recipe_of(request)
        try:
            context["check"] = recipes.check(viewer=request.user, body=body)
            context["recipe"] = json.dumps(body, indent=2)
        except HubError as failure:
            context["error"] = failure
    return render(request, "hub/_merge_check.html", context)


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
    if output := _output_of(request):
        body["output"] = output
    if request.POST.get("acknowledge"):
        body["acknowledge_licences"] = True
    if seed := request.POST.get("seed", "").strip():
        body["seed"] = typed(seed)
    return body


def _output_of(request: HttpRequest) -> dict[str, Any]:
    """What was said of the result; what was left open is left to the hub."""
    given = {name: request.POST.get(name, "").strip() for name in ("kind", "rank", "energy", "dtype")}
    output: dict[str, Any] = {}
    if given["energy"]:
        output["rank"] = {"energy": typed(given["energy"])}
    if given["rank"]:
        output["rank"] = typed(given["rank"])
    if given["dtype"] and given["dtype"] != DTYPES[0]:
        output["dtype"] = given["dtype"]
    if given["kind"] or output:
        output["kind"] = given["kind"] or "lora"
    return output


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


@login_required
@require_POST
@page
def change(request: HttpRequest, merge_id: str) -> HttpResponse:
    """Start a merge, or stop the work on it."""
    assert isinstance(request.user, User)
    found = selectors.merge(merge_id, request.user)
    job = selectors.job_of_merge(found)
    if request.POST.get("action") == "start":
        merges.touch(found)
    elif job is not None:
        if not _may_cancel(request, job):
            raise NotAllowed("Only who asked for a merge may stop it.")
        jobs.cancel(job)
    return redirect("merge-result", merge_id=found.pk)


def context_of(request: HttpRequest, merge_id: str) -> dict[str, Any]:
    found = selectors.merge(merge_id, request.user)
    revision = Revision.objects.filter(merge=found).first()
    job = selectors.job_of_merge(found)
    parents = list(found.parents.select_related("revision__expert__namespace"))
    is_moving = found.state in {Merge.State.QUEUED, Merge.State.RUNNING} or (
        job is not None and job.state not in Job.FINISHED
    )
    modules = [row for row in found.report.get("modules", []) if row.get("energy_kept", 1.0) < 1.0]
    return {
        "merge": found,
        "recipe": json.dumps(json.loads(found.recipe.canonical), indent=2),
        "parents": parents,
        "graph": graphs.of_lineage(lineage.of_merge(found, request.user)),
        "kinship": kinship_of(parents),
        "weakest": sorted(modules, key=lambda row: row["energy_kept"])[:WEAKEST],
        "yanked": selectors.yanked_parents(found),
        "fork": f"{reverse('merge')}?{urlencode(form_of(found, parents), doseq=True)}",
        "revision": revision,
        "files": revision.files.select_related("blob") if revision else [],
        "job": job,
        "is_moving": is_moving,
        "may_cancel": job is not None and is_moving and _may_cancel(request, job),
        "may_start": request.user.is_authenticated and found.state in merges.SLEEPING,
        "endpoint": request.build_absolute_uri("/").rstrip("/"),
    }


def _may_cancel(request: HttpRequest, job: Job) -> bool:
    return isinstance(request.user, User) and (request.user.is_staff or job.requested_by_id == request.user.pk)


def kinship_of(parents: list[MergeParent]) -> list[dict[str, Any]]:
    """What is known of each pair of parents; nothing is measured for a page."""
    digests = [recipes.content_digest(parent.revision) for parent in parents]
    pairs = {
        (one, other): kinship.pair_of(digests[one], digests[other])
        for one, other in combinations(range(len(parents)), 2)
    }
    known = kinship.figures(pairs.values())
    names = [parent.revision.expert.full_name if parent.revision.expert else "" for parent in parents]
    return [
        {"first": names[one], "second": names[other], **known[pair]}
        for (one, other), pair in pairs.items()
        if pair in known
    ]


def form_of(merge: Merge, parents: list[MergeParent]) -> dict[str, Any]:
    """The fields of the form that would register this recipe again."""
    recipe = json.loads(merge.recipe.canonical)
    output = recipe.get("output", {})
    names = [parent.revision.expert.full_name for parent in parents if parent.revision.expert]
    fields: dict[str, Any] = {
        "base_model": merge.base_model.name,
        "method": recipe["method"],
        "expert": names,
        "kind": output.get("kind", ""),
        "dtype": output.get("dtype") or "",
    }
    fields |= {f"weight:{name}": f"{parent.weight:g}" for name, parent in zip(names, parents, strict=True)}
    fields |= {
        f"parameter:{recipe['method']}:{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in recipe["parameters"].items()
        if value is not None
    }
    rank = output.get("rank")
    if isinstance(rank, dict):
        fields["energy"] = f"{rank['energy']:g}"
    elif rank is not None:
        fields["rank"] = rank
    if "seed" in recipe:
        fields["seed"] = recipe["seed"]
    return fields
