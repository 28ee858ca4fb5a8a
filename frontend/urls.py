"""Every page on one screen."""

from django.urls import path

from frontend.views import account, catalogue, compression, docs, home, merging, router, uploading

urlpatterns = [
    path("", home.home, name="home"),
    path("ask", home.ask, name="ask"),
    path("search", catalogue.search, name="search"),
    path("router", router.router, name="router"),
    path("router/answer", router.ask, name="router-answer"),
    path("router/download", router.download, name="router-download"),
    path("upload", uploading.upload, name="upload"),
    path("upload/preview", uploading.preview, name="upload-preview"),
    path("merge", merging.builder, name="merge"),
    path("merge/check", merging.check, name="merge-check"),
    path("merges/<str:merge_id>", merging.merge, name="merge-result"),
    path("merges/<str:merge_id>/status", merging.status, name="merge-status"),
    path("merges/<str:merge_id>/change", merging.change, name="merge-change"),
    path("login", account.SignIn.as_view(), name="login"),
    path("logout", account.sign_out, name="logout"),
    path("join", account.join, name="join"),
    path("settings", account.settings_page, name="settings"),
    path("settings/keys", account.make_key, name="make-key"),
    path("settings/keys/<int:key_id>/revoke", account.revoke_key, name="revoke-key"),
    path("docs", docs.index, name="docs"),
    path("docs/<slug:page>", docs.page, name="docs-page"),
    path("docs/methods/<slug:page>", docs.page, {"folder": "methods"}, name="docs-method"),
    path("<str:owner>", catalogue.owner, name="owner"),
    path("<str:owner>/<str:name>", catalogue.expert, name="expert"),
    path("<str:owner>/<str:name>/status", catalogue.status, name="expert-status"),
    path("<str:owner>/<str:name>/compressed", compression.forms, name="expert-compressed"),
    path("<str:owner>/<str:name>/neighbours", catalogue.alike, name="expert-neighbours"),
    path("<str:owner>/<str:name>/change", catalogue.change, name="expert-change"),
    path("<str:owner>/<str:name>/tree/<str:revision>", catalogue.expert, name="expert-tree"),
]
