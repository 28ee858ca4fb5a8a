"""Errors on pages: the same record that the API sends, in words."""

from collections.abc import Callable
from functools import wraps

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from moerge.errors import MoergeError
from registry.errors import HubError, Invalid

View = Callable[..., HttpResponse]


def page(view: View) -> View:
    """Show a HubError of the view as a page that says what to do."""

    @wraps(view)
    def wrapped(request: HttpRequest, *args: str, **kwargs: str) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except HubError as error:
            return problem(request, error)
        except MoergeError as error:
            return problem(request, Invalid.of(error))

    return wrapped


def problem(request: HttpRequest, error: HubError) -> HttpResponse:
    response = render(request, "hub/problem.html", {"error": error}, status=error.status)
    if error.retry_after_seconds is not None:
        response["Retry-After"] = str(error.retry_after_seconds)
    return response
