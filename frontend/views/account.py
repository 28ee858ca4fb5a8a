"""Signing in, joining, and API keys."""

from django import forms
from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login, logout
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from frontend.views.common import page, problem
from registry.errors import HubError, NotFound, RateExceeded
from registry.models import ApiKey, User
from registry.services import accounts, keys

LOGIN_WINDOW_SECONDS = 300


class SignIn(LoginView):
    """Sign in; after too many wrong passwords for one name or address it says how long to wait."""

    template_name = "hub/login.html"
    redirect_authenticated_user = True

    def post(self, request: HttpRequest, *args: str, **kwargs: str) -> HttpResponse:
        if settings.HUB_RATE_LIMITS and any(
            cache.get(name, 0) >= settings.HUB_RATE_LOGIN_PER_5_MINUTES for name in attempts_of(request)
        ):
            wait = RateExceeded(
                "Too many wrong passwords. Wait five minutes, then try again.", retry_after_seconds=LOGIN_WINDOW_SECONDS
            )
            return problem(request, wait)
        return super().post(request, *args, **kwargs)

    def form_invalid(self, form: forms.Form) -> HttpResponse:
        for name in attempts_of(self.request):
            cache.add(name, 0, LOGIN_WINDOW_SECONDS)
            cache.incr(name)
        return super().form_invalid(form)  # type: ignore[arg-type]


def attempts_of(request: HttpRequest) -> list[str]:
    return [
        f"login:name:{request.POST.get('username', '')[:96].casefold()!r}",
        f"login:address:{request.META.get('REMOTE_ADDR')}",
    ]


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return redirect("home")


@page
def join(request: HttpRequest) -> HttpResponse:
    """Make an account."""
    error: HubError | None = None
    if request.method == "POST":
        try:
            user = accounts.create_user(
                name=request.POST.get("name", "").strip(),
                password=request.POST.get("password", ""),
                email=request.POST.get("email", "").strip(),
            )
        except HubError as failure:
            error = failure
        else:
            login(request, user, backend="django.contrib.auth.backends.ModelBackend")
            return redirect("settings")
    return render(
        request,
        "hub/join.html",
        {"error": error, "name": request.POST.get("name", "")},
        status=error.status if error else 200,
    )


@login_required
@page
def settings_page(request: HttpRequest) -> HttpResponse:
    rows = ApiKey.objects.filter(user_id=request.user.pk or 0, revoked_at=None).order_by("-id")
    scopes = [scope for scope in ApiKey.SCOPES if scope != "admin" or request.user.is_staff]
    return render(
        request, "hub/settings.html", {"keys": rows, "scopes": scopes, "secret": request.session.pop("secret", "")}
    )


@login_required
@require_POST
@page
def make_key(request: HttpRequest) -> HttpResponse:
    assert isinstance(request.user, User)
    _, secret = keys.create(
        user=request.user, name=request.POST.get("name", "").strip() or "key", scopes=request.POST.getlist("scope")
    )
    request.session["secret"] = secret  # shown once, on the page that follows
    return redirect("settings")


@login_required
@require_POST
@page
def revoke_key(request: HttpRequest, key_id: int) -> HttpResponse:
    assert isinstance(request.user, User)
    row = ApiKey.objects.filter(pk=key_id, user=request.user, revoked_at=None).first()
    if row is None:
        raise NotFound("You have no such key.")
    keys.revoke(user=request.user, key=row)
    messages.success(request, "The key is revoked.")
    return redirect("settings")
