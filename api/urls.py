"""Every machine door on one screen: the REST API and the Hub protocol of stock clients."""

from django.urls import URLPattern, URLResolver, include, path

urlpatterns: list[URLPattern | URLResolver] = [
    path("api/v1/", include("api.v1.urls")),
    path("", include("api.hf.urls")),
]
