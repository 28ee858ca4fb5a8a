"""Every door of the web process on one screen."""

from django.conf import settings
from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path

from config import health

handler404 = "config.handlers.not_found"
handler500 = "config.handlers.broken"

urlpatterns: list[URLPattern | URLResolver] = [
    path("healthz", health.alive),
    path("readyz", health.ready),
    path("metrics", health.metrics),
    # Not below /admin: that is where the experts of the first administrator are.
    path("administration/", admin.site.urls),
    path("", include("api.urls")),
    path("", include("frontend.urls")),
]
if settings.DEBUG:
    from django.contrib.staticfiles.urls import staticfiles_urlpatterns

    urlpatterns += staticfiles_urlpatterns()
