"""Routes of the Hub protocol, as huggingface_hub asks for them. All but experts and merges is not found."""

from django.http import HttpRequest, HttpResponseBase
from django.urls import URLPattern, URLResolver, path, re_path

from api.hf import files, identity, listing, repositories, uploads
from api.hf.door import Caller, endpoint
from registry.errors import ExpertNotFound

PART = r"[A-Za-z0-9_.-]{1,200}"
NAME = rf"(?P<full_name>{PART}/{PART})"
REST = r"(?P<rest>[\s\S]+)"  # a newline may be in it; Django cannot turn a flag group back into an address
MODEL = rf"^api/models/{NAME}"
ANYTHING = r"[\s\S]*$"


@endpoint("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH")
def absent(_request: HttpRequest, _caller: Caller, /, **_parts: str) -> HttpResponseBase:
    """A repository that cannot be here: of another type, or without an owner, as base models are often written."""
    raise ExpertNotFound("No such repository.")


urlpatterns: list[URLPattern | URLResolver] = [
    path("api/whoami-v2", identity.whoami),
    path("api/validate-yaml", identity.validate_yaml),
    path("api/agent-harnesses", identity.agent_harnesses),
    path("api/repos/create", repositories.create),
    path("api/repos/delete", repositories.delete),
    path("api/repos/move", repositories.move),
    path("api/models", listing.models),
    re_path(rf"{MODEL}/revision/{REST}$", listing.model),
    re_path(rf"{MODEL}/settings$", repositories.settings),
    re_path(rf"{MODEL}/auth-check$", repositories.auth_check),
    re_path(rf"{MODEL}/refs$", listing.refs),
    re_path(rf"{MODEL}/commits/{REST}$", listing.commits),
    re_path(rf"{MODEL}/tree/{REST}$", listing.tree),
    re_path(rf"{MODEL}/paths-info/{REST}$", listing.paths_info),
    re_path(rf"{MODEL}/branch/{REST}$", repositories.branch),
    re_path(rf"{MODEL}/tag/{REST}$", repositories.tag),
    re_path(rf"{MODEL}/preupload/{REST}$", uploads.preupload),
    re_path(rf"{MODEL}/commit/{REST}$", uploads.commit),
    re_path(rf"{MODEL}/(?:super-squash/{REST}|discussions{ANYTHING}|lfs-files{ANYTHING})", identity.not_implemented),
    re_path(rf"{MODEL}/(?:xet-write-token|xet-read-token)/{REST}$", identity.not_implemented),
    re_path(rf"{MODEL}$", listing.model),
    re_path(rf"^{NAME}\.git/info/lfs/{REST}$", identity.not_implemented),
    re_path(rf"^{NAME}/(?:resolve|raw)/{REST}$", files.resolve),
    re_path(rf"^{NAME}/(?:blob|commit)/{REST}$", files.page),
    re_path(rf"^{NAME}/tree/(?P<rest>[^/]+/[\s\S]*)$", files.page),
    re_path(r"^(?:datasets|spaces|kernels)/[\s\S]+$", absent),
    re_path(rf"^{PART}/(?:resolve|raw)/{REST}$", absent),
    re_path(rf"^api/(?:models|datasets|spaces|kernels)/{ANYTHING}", absent),
    re_path(rf"^api/(?!v1/){ANYTHING}", identity.nowhere),
]
