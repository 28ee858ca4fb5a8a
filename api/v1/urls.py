"""Every route of the REST API."""

from django.urls import path
from drf_spectacular.renderers import OpenApiJsonRenderer
from drf_spectacular.views import SpectacularAPIView

from api.v1 import (
    catalogue,
    evaluations,
    experts,
    jobs,
    keys,
    lineage,
    merges,
    neighbours,
    packs,
    routing,
    uploads,
)

urlpatterns = [
    path("openapi.json", SpectacularAPIView.as_view(renderer_classes=[OpenApiJsonRenderer], urlconf="api.urls")),
    path("uploads", uploads.Uploads.as_view()),
    path("uploads/<str:upload_id>", uploads.OneUpload.as_view()),
    path("uploads/<str:upload_id>/complete", uploads.CompleteUpload.as_view()),
    path("uploads/<str:upload_id>/files/<path:file_path>", uploads.UploadContent.as_view()),
    path("experts", experts.Experts.as_view()),
    path("experts/<str:owner>/<str:name>", experts.OneExpert.as_view()),
    path("experts/<str:owner>/<str:name>/revisions", experts.Revisions.as_view()),
    path("experts/<str:owner>/<str:name>/revisions/<str:revision>", experts.OneRevision.as_view()),
    path("experts/<str:owner>/<str:name>/compressed", experts.Compressed.as_view()),
    path("experts/<str:owner>/<str:name>/lineage", lineage.ExpertLineage.as_view()),
    path("experts/<str:owner>/<str:name>/neighbours", neighbours.Neighbours.as_view()),
    path("route", routing.Route.as_view()),
    path("route/vector", routing.RouteVector.as_view()),
    path("route/preview", routing.Preview.as_view()),
    path("route/merge", routing.RouteMerge.as_view()),
    path("routing/packs", packs.Packs.as_view()),
    path("routing/evaluations", evaluations.Evaluations.as_view()),
    path("routing/export", evaluations.Export.as_view()),
    path("merges", merges.Merges.as_view()),
    path("merges/check", merges.MergeCheck.as_view()),
    path("merges/<str:merge_id>", merges.OneMerge.as_view()),
    path("merges/<str:merge_id>/lineage", lineage.MergeLineage.as_view()),
    path("jobs/<str:job_id>", jobs.OneJob.as_view()),
    path("jobs/<str:job_id>/cancel", jobs.CancelJob.as_view()),
    path("jobs/<str:job_id>/retry", jobs.RetryJob.as_view()),
    path("methods", catalogue.Methods.as_view()),
    path("bases", catalogue.Bases.as_view()),
    path("by-hash/<str:sha256>", catalogue.ByHash.as_view()),
    path("keys", keys.Keys.as_view()),
    path("keys/<int:key_id>", keys.OneKey.as_view()),
]
