"""How often one caller may ask. Counted per process, so the bound is soft by the number of web processes."""

from django.conf import settings
from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle
from rest_framework.views import APIView


class CallerThrottle(SimpleRateThrottle):
    """A bucket for each user, and a smaller one for each address of anonymous callers."""

    scope = "caller"
    rate = "1/min"  # replaced for each request

    def allow_request(self, request: Request, view: APIView) -> bool:
        if not settings.HUB_RATE_LIMITS:
            return True
        known = request.user is not None and request.user.is_authenticated
        limit = settings.HUB_RATE_API_PER_MINUTE if known else settings.HUB_RATE_ANONYMOUS_PER_MINUTE
        self.num_requests, self.duration = limit, 60
        return bool(super().allow_request(request, view))

    def get_cache_key(self, request: Request, view: APIView) -> str:  # noqa: ARG002 - the framework's signature
        if request.user is not None and request.user.is_authenticated:
            return f"throttle:user:{request.user.pk}"
        return f"throttle:address:{self.get_ident(request)}"
