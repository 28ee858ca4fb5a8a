"""What is answered when no door knows the address, or a view broke: a problem for machines, a page for people."""

from django.http import HttpRequest, HttpResponse

from api import problems
from frontend.views import common
from registry.errors import HubError, NotFound


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:  # noqa: ARG001 - named by Django
    return answer(request, NotFound("There is nothing at this address."))


def broken(request: HttpRequest) -> HttpResponse:
    return answer(request, HubError("An error of the hub; the log has it under this request id."))


def answer(request: HttpRequest, error: HubError) -> HttpResponse:
    return problems.answer(error) if request.path.startswith("/api/") else common.problem(request, error)
