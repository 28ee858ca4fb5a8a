"""The upload page: the files go by the REST API, as everybody's do; this only shows the form."""

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from frontend.views.common import page
from registry.checks import compression
from registry.models import BaseModel, Membership


@login_required
@page
def upload(request: HttpRequest) -> HttpResponse:
    roles = (Membership.Role.WRITER, Membership.Role.OWNER)
    spaces = Membership.objects.filter(user_id=request.user.pk or 0, role__in=roles).values_list(
        "namespace__name", flat=True
    )
    bases = BaseModel.objects.order_by("name").values_list("name", flat=True)
    context = {"spaces": list(spaces), "bases": list(bases), "densities": compression.STANDARD_DENSITIES}
    return render(request, "hub/upload.html", context)
