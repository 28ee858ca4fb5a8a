"""Repositories as a whole: made, moved, hidden, deleted; their branches and tags."""

from typing import Any

from django.http import HttpRequest, HttpResponseBase, JsonResponse

from api.hf import addresses, snapshots
from api.hf.door import Caller, endpoint, json_of, site, text_of
from registry import selectors
from registry.errors import ExpertNotFound, Fault, NameTaken, NotAllowed, RequestInvalid
from registry.models import Expert, Ref, User
from registry.services import experts, refs


def writable(caller: Caller, full_name: str) -> tuple[User, Expert]:
    """An expert that the caller may change. Raises Unauthenticated, ScopeMissing, ExpertNotFound, NotAllowed."""
    user = caller.require("write")
    repository = selectors.repository(full_name, user)
    if repository.expert is None:
        raise NotAllowed(f"{full_name} is a merge; it belongs to nobody and does not change.")
    experts.require_write(user, repository.expert)
    return user, repository.expert


@endpoint("POST")
def create(request: HttpRequest, caller: Caller) -> HttpResponseBase:
    """Make an empty expert; one that exists is told by 409 with its address, which clients may take for success."""
    user = caller.require("write")
    record = json_of(request)
    check_type(record)
    full_name = full_name_of(record, user)
    is_private = record.get("private") is True or record.get("visibility") == "private"
    try:
        expert = experts.create(user=user, full_name=full_name, private=is_private)
    except NameTaken as error:
        name = _present_name(full_name, user)
        if name is None:
            raise
        body = {"error": error.detail, "url": f"{site(request)}/{name}", "name": name, "id": name}
        return JsonResponse(body, status=409, headers={"X-Error-Message": "The repository exists already."})
    name = expert.full_name
    return JsonResponse({"url": f"{site(request)}/{name}", "name": name, "id": name})


def _present_name(full_name: str, user: User) -> str | None:
    """How the expert that has the name writes it; None when the caller may not see it."""
    try:
        return selectors.expert(full_name, user).full_name
    except ExpertNotFound:
        return None


@endpoint("DELETE")
def delete(request: HttpRequest, caller: Caller) -> HttpResponseBase:
    user = caller.require("write")
    record = json_of(request)
    if record.get("type") not in {None, "model"}:
        raise ExpertNotFound("Only models are kept here.")
    user, expert = writable(caller, full_name_of(record, user))
    experts.delete(user=user, expert=expert)
    return JsonResponse({"deleted": True})


@endpoint("POST")
def move(request: HttpRequest, caller: Caller) -> HttpResponseBase:
    caller.require("write")
    record = json_of(request)
    check_type(record)
    user, expert = writable(caller, text_of(record, "fromRepo"))
    target = text_of(record, "toRepo")
    experts.rename(user=user, expert=expert, full_name=target)
    return JsonResponse({"url": f"{site(request)}/{target}", "name": target})


@endpoint("PUT")
def settings(request: HttpRequest, caller: Caller, full_name: str) -> HttpResponseBase:
    """Change who may see an expert. Gating is not offered."""
    user, expert = writable(caller, full_name)
    record = json_of(request)
    visibility = record.get("visibility")
    if visibility is None and isinstance(record.get("private"), bool):  # as older clients write it
        visibility = "private" if record["private"] else "public"
    if visibility is not None and visibility not in Expert.Visibility.values:
        raise RequestInvalid(
            "This visibility is not known.", faults=[Fault("/visibility", visibility, Expert.Visibility.values)]
        )
    if record.get("gated") not in {None, False}:
        raise RequestInvalid(
            "Gated access is not offered here.",
            faults=[Fault("/gated", record["gated"], False, "Make the expert private instead.")],
        )
    if visibility is not None:
        experts.change_visibility(user=user, expert=expert, visibility=visibility)
    after = selectors.expert(full_name, user)
    return JsonResponse({"private": after.visibility == Expert.Visibility.PRIVATE, "gated": False})


@endpoint("GET", "HEAD")
def auth_check(_request: HttpRequest, caller: Caller, full_name: str) -> HttpResponseBase:
    """Whether the caller may read; nobody needs to ask for access here."""
    selectors.repository(full_name, caller.viewer)
    return JsonResponse({"ok": True})


@endpoint("POST", "DELETE")
def branch(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    user, expert = writable(caller, full_name)
    name = whole(request, rest)
    if request.method == "DELETE":
        refs.delete(user=user, expert=expert, name=name, kind=Ref.Kind.BRANCH)
        return JsonResponse({"deleted": True})
    start = text_of(json_of(request), "startingPoint", "main")
    at = snapshots.at(selectors.Repository(expert, None), addresses.plain(start), user)
    refs.create(user=user, expert=expert, name=name, kind=Ref.Kind.BRANCH, revision=at.own_revision())
    return JsonResponse({"ref": f"refs/heads/{name}", "targetCommit": at.commit}, status=201)


@endpoint("POST", "DELETE")
def tag(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """POST names the revision in the address by the tag in the body; DELETE forgets the tag in the address."""
    user, expert = writable(caller, full_name)
    name = whole(request, rest)
    if request.method == "DELETE":
        refs.delete(user=user, expert=expert, name=name, kind=Ref.Kind.TAG)
        return JsonResponse({"deleted": True})
    at = snapshots.at(selectors.Repository(expert, None), name, user)
    made = text_of(json_of(request), "tag")
    refs.create(user=user, expert=expert, name=made, kind=Ref.Kind.TAG, revision=at.own_revision())
    return JsonResponse({"ref": f"refs/tags/{made}", "targetCommit": at.commit}, status=201)


def whole(request: HttpRequest, rest: str) -> str:
    """A branch or tag name that is the last segment of /api/models/owner/name/branch/<it>."""
    name, path = addresses.split(request, before=5, rest=rest)
    return f"{name}/{path}" if path else name


def full_name_of(record: dict[str, Any], user: User) -> str:
    """owner/name of a body that has them apart; without owner it is the caller's own namespace."""
    name = text_of(record, "name")
    if "/" in name:
        return name
    return f"{text_of(record, 'organization', user.username)}/{name}"


def check_type(record: dict[str, Any]) -> None:
    """Raises RequestInvalid for data sets, spaces and the like."""
    if record.get("type") not in {None, "model"}:
        raise RequestInvalid(
            "This hub keeps models only.", faults=[Fault("/type", record["type"], "model", "Leave the type out.")]
        )
