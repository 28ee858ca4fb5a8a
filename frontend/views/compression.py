"""The section of an expert's page that shows its compressed forms and has further ones made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods

from frontend import charts
from frontend.views.common import page
from registry import selectors
from registry.checks import compression, files
from registry.checks.compression import Choice, Form
from registry.errors import FileNotFound, FormPending, NotAllowed
from registry.models import Encoded, Expert, Job, Revision, User
from registry.selectors import Repository
from registry.services import encodings, experts


@dataclass(frozen=True)
class Row:
    """One form: made, being made, failed, or one that can be had for the asking."""

    form: Form
    encoded: Encoded | None = None
    job: Job | None = None
    accuracy: float | None = None
    address: str = ""

    @property
    def density(self) -> str:
        return "all" if self.form.preset == compression.INT4 else charts.share_text(self.form.density)

    @property
    def is_moving(self) -> bool:
        return self.job is not None and self.job.state not in Job.FINISHED


@page
@require_http_methods(["GET", "HEAD", "POST"])
def forms(request: HttpRequest, owner: str, name: str) -> HttpResponse:
    """GET the section alone, as the page asks for it again while something is being made; POST asks for a form."""
    given = request.POST if request.method == "POST" else request.GET
    found = selectors.expert(f"{owner}/{name}", request.user)
    revision = selectors.revision(Repository(found, None), given.get("revision") or "main")
    if request.method == "POST":
        choice = compression.asked(preset=given.get("preset") or None, density=given.get("density") or None)
        ask(request, found, revision, choice)
        return redirect(address_of(found, revision))
    return render(request, "hub/_compressed.html", {"expert": found, **context(request, found, revision)})


def ask(request: HttpRequest, expert: Expert, revision: Revision, choice: Choice | None) -> None:
    """Have a form made; one that is there or under way already is left as it is."""
    user = request.user if isinstance(request.user, User) else None

    def permit() -> None:
        if user is None:
            raise NotAllowed("Sign in to have other forms made than those of the table.")
        experts.require_write(user, expert)

    try:
        encodings.obtain(revision=revision, choice=choice, user=user, permit=permit)
    except FormPending:
        return


def address_of(expert: Expert, revision: Revision) -> str:
    """The section on the page of a revision."""
    place = [expert.namespace.name, expert.name]
    if revision == selectors.head(expert):
        return f"{reverse('expert', args=place)}#compressed"
    return f"{reverse('expert-tree', args=[*place, revision.commit])}#compressed"


def context(request: HttpRequest, expert: Expert, revision: Revision | None) -> dict[str, Any]:
    """What `hub/_compressed.html` shows of a revision; `forms` is empty where nothing can be compressed."""
    if revision is None or revision.state == Revision.State.INCOMPLETE or revision.derived_from_id is not None:
        return {"forms": []}
    accuracies = selectors.accuracies(revision)
    rows = rows_of(expert, revision, accuracies)
    made = [row.encoded for row in rows if row.encoded is not None]
    own = next((encoded for encoded in made if encoded.is_own), None)
    return {
        "revision": revision,
        "address": address_of(expert, revision),
        "forms": rows,
        "own": own,
        "chart": drawing(made),
        "has_others": any(encoded.preset != compression.DEFAULT or encoded.variant for encoded in made),
        "original": original(revision),
        "original_accuracy": accuracies.get(None),
        "has_accuracy": bool(accuracies),
        "is_making": any(row.is_moving for row in rows),
        "nothing": next((row.job.message for row in rows if row.job and row.job.state == Job.State.NOT_APPLICABLE), ""),
        "loss_warnings": list(dict.fromkeys(text for encoded in made for text in encoded.report.get("warnings", []))),
        "presets": list(compression.RULES),
        "may_make_other": selectors.may_write(request.user, expert.namespace.name),
    }


def rows_of(expert: Expert, revision: Revision, accuracies: Mapping[tuple[str, float] | None, float]) -> list[Row]:
    """Forms that exist, jobs that make more, and the standard densities that nobody has asked for yet."""
    jobs = encodings.unfinished(revision)
    found: dict[Form, Row] = {
        form: Row(form) for form in (Form(compression.DEFAULT, density) for density in compression.STANDARD_DENSITIES)
    }
    found |= {form: Row(form, job=job) for form, job in jobs.items()}
    for encoded in selectors.forms(revision):
        form = Form(encoded.preset, encoded.density, encoded.variant)
        address = selectors.form_path(encoded, expert.full_name, revision.commit)
        measured = accuracies.get((form.preset, form.density))
        found[form] = Row(form, encoded, accuracy=measured, address=address)
    return sorted(
        found.values(),
        key=lambda row: (list(compression.RULES).index(row.form.preset), row.form.variant, row.form.density),
    )


def drawing(made: list[Encoded]) -> charts.Chart | None:
    """The bytes of the files that exist over the bound for their ternary values."""
    ternary = [encoded for encoded in made if encoded.preset != compression.INT4]
    if not ternary:
        return None
    count = max(int(encoded.report.get("size") or 0) for encoded in ternary)
    if count == 0:
        return None
    return charts.chart(
        count=count,
        files=[
            (encoded.density, encoded.blob.size_bytes, encoded.preset == compression.DEFAULT and not encoded.variant)
            for encoded in ternary
        ],
    )


def original(revision: Revision) -> int | None:
    """Bytes of the weights as they were uploaded."""
    try:
        return selectors.file(revision, files.WEIGHTS).blob.size_bytes
    except FileNotFound:
        return None
