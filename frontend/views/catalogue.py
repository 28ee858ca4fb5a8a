"""Looking for experts and at one of them."""

from contextlib import closing

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from frontend import graphs
from frontend.views import compression
from frontend.views.common import page
from registry import jobs, selectors
from registry.errors import ExpertNotFound, FileNotFound, NotAllowed
from registry.models import Expert, Job, Namespace, Revision, User
from registry.services import downloads, experts, lineage, neighbours, reconstructions

PAGE = 30
FACETS = {"base_model": "base_model__name", "kind": "adapter_kind", "licence": "licence"}


@page
def search(request: HttpRequest) -> HttpResponse:
    """All of the state is in the address, so a search can be kept as a bookmark."""
    wanted = selectors.Search.of(request.GET)
    found = selectors.search(request.user, wanted)
    start = int(request.GET["cursor"]) if request.GET.get("cursor", "").isdigit() else 0
    rows = list(found[start : start + PAGE + 1])
    following = request.GET.copy()
    following["cursor"] = str(start + PAGE)
    facets = {
        name: [
            (value, count)
            for value, count in found.order_by().values_list(column).annotate(count=Count("pk", distinct=True))
            if value
        ]
        for name, column in FACETS.items()
    }
    context = {
        "wanted": wanted,
        "rows": rows[:PAGE],
        "count": found.count(),
        "facets": facets,
        "next": following.urlencode() if len(rows) > PAGE else "",
    }
    return render(request, "hub/search.html", context)


@page
def owner(request: HttpRequest, owner: str) -> HttpResponse:
    namespace = Namespace.objects.filter(name__iexact=owner).first()
    if namespace is None:
        raise ExpertNotFound(f"There is nobody called {owner[:96]!r} here.")
    rows = Expert.objects.visible_to(request.user).filter(namespace=namespace).select_related("namespace", "base_model")
    return render(request, "hub/owner.html", {"namespace": namespace, "rows": rows.order_by("name")})


@page
def expert(request: HttpRequest, owner: str, name: str, revision: str = "main") -> HttpResponse:
    found = selectors.expert(f"{owner}/{name}", request.user)
    if revision in reconstructions.DENSITIES:
        # It is files for machines; people see what they are made from.
        return redirect(f"{reverse('expert', args=[owner, name])}#compressed")
    head = selectors.head(found)
    shown = head
    if revision != "main":
        shown = selectors.revision(selectors.Repository(found, None), revision)
    evaluations = list(shown.evaluations.order_by("pk")) if shown else []
    context = {
        "expert": found,
        "revision": shown,
        "is_head": shown == head,
        "files": shown.files.select_related("blob") if shown else [],
        **compression.context(request, found, shown),
        "evaluations": evaluations,
        "has_measured_forms": any(row.preset for row in evaluations),
        "history": selectors.history(found)[:20],
        "card": card_body(shown),
        "neighbours": neighbours.near(shown, request.user) if shown else None,
        "children": selectors.merges_of(found, request.user)[:20],
        "graph": graphs.of_lineage(lineage.of_expert(selectors.history(found), request.user)),
        "may_write": selectors.may_write(request.user, owner),
        **progress(shown),
    }
    return render(request, "hub/expert.html", context)


@page
def status(request: HttpRequest, owner: str, name: str) -> HttpResponse:
    """The jobs of the head; the fragment asks for itself again while one of them runs."""
    found = selectors.expert(f"{owner}/{name}", request.user)
    return render(request, "hub/_jobs.html", {"expert": found, **progress(selectors.head(found))})


@page
def alike(request: HttpRequest, owner: str, name: str) -> HttpResponse:
    """The neighbours alone: the page asks for them when it is there, because those by text come from the router."""
    found = selectors.expert(f"{owner}/{name}", request.user)
    revision = selectors.revision(selectors.Repository(found, None), request.GET.get("revision") or "main")
    told = {**neighbours.of(revision, request.user), "is_whole": True}
    return render(request, "hub/_neighbours.html", {"expert": found, "revision": revision, "neighbours": told})


def progress(revision: Revision | None) -> dict[str, object]:
    rows = list(jobs.of_pipeline(revision.pk)) if revision else []
    return {
        "jobs": rows,
        "state": revision.state if revision else "incomplete",
        "is_moving": any(row.state not in Job.FINISHED for row in rows),
    }


def card_body(revision: Revision | None) -> str:
    """The card without its front matter; empty when there is none."""
    if revision is None:
        return ""
    try:
        file = selectors.file(revision, "README.md")
    except FileNotFound:
        return ""
    with closing(downloads.open(file)) as stored:
        text = b"".join(stored).decode(errors="replace")
    if text.startswith("---\n"):
        _, _, rest = text[4:].partition("\n---")
        return rest.lstrip("-").lstrip()
    return text


@login_required
@require_POST
@page
def change(request: HttpRequest, owner: str, name: str) -> HttpResponse:
    """Visibility, yank and delete, each as its own button."""
    assert isinstance(request.user, User)
    found = selectors.expert(f"{owner}/{name}", request.user)
    action = request.POST.get("action")
    if action in Expert.Visibility.values:
        experts.change_visibility(user=request.user, expert=found, visibility=action)
        messages.success(request, f"{found.full_name} is {action} now.")
    elif action in {"yank", "unyank"}:
        reason = request.POST.get("reason", "")[:300]
        experts.yank(user=request.user, expert=found, yanked=action == "yank", reason=reason)
        messages.success(request, f"{found.full_name} is {'yanked' if action == 'yank' else 'listed again'}.")
    elif action == "delete":
        if request.POST.get("confirm") != found.full_name:
            raise NotAllowed("To delete the expert, type its full name into the field.")
        experts.delete(user=request.user, expert=found)
        messages.success(request, f"{found.full_name} is deleted.")
        return redirect("owner", owner=owner)
    return redirect("expert", owner=owner, name=name)
