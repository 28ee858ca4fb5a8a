"""The upload page: the files go by the REST API, as everybody's do; this shows the form and what routing to expect."""

from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from frontend.views.common import page
from registry.checks import cards, compression
from registry.errors import HubError
from registry.models import BaseModel, Membership
from registry.services import previews


@login_required
@page
def upload(request: HttpRequest) -> HttpResponse:
    roles = (Membership.Role.WRITER, Membership.Role.OWNER)
    spaces = Membership.objects.filter(user_id=request.user.pk or 0, role__in=roles).values_list(
        "namespace__name", flat=True
    )
    bases = BaseModel.objects.order_by("name").values_list("name", flat=True)
    context = {
        "spaces": list(spaces),
        "bases": list(bases),
        "densities": compression.STANDARD_DENSITIES,
        "most_examples": cards.EXAMPLES_COUNT,
    }
    return render(request, "hub/upload.html", context)


@login_required
@require_POST
@page
def preview(request: HttpRequest) -> HttpResponse:
    """How well the card would be found, as a part of the upload page; a refusal is shown in the same place."""
    context: dict[str, Any] = {"levels": previews.LEVELS, "found": None, "error": None}
    try:
        draft = draft_of(request)
        context["examples"] = draft["examples"]
        if draft["base_model"]:
            context["found"] = found = previews.preview(viewer=request.user, **draft)
            context["rows"] = [(draft["examples"][row["index"]], row) for row in found["texts"]]
    except HubError as error:
        context["error"] = error
    return render(request, "hub/_upload_preview.html", context)


def draft_of(request: HttpRequest) -> dict[str, Any]:
    """The form as POST /api/v1/route/preview takes it; what it leaves open is what the files say.

    Raises UploadInvalid for a card that breaks a rule.
    """
    given = {name: text.replace("\0", "").strip() for name, text in request.POST.items() if isinstance(text, str)}
    card = cards.parse(given.get("readme", ""))
    lines = [line.strip() for line in given.get("examples", "").splitlines() if line.strip()]
    return {
        "base_model": given.get("base_model") or card.base_model or given.get("detected_base", ""),
        "name": "/".join(part for part in (given.get("owner"), given.get("name") or "draft") if part),
        "description": given.get("description") or card.description,
        "examples": lines or list(card.examples),
        "instruction": given.get("instruction", ""),
        "tags": list(card.tags),
    }
