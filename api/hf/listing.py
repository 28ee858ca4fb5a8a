"""What is there: the catalogue, one repository, its refs, history and tree."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.http import HttpRequest, HttpResponseBase, JsonResponse, QueryDict

from api.hf import addresses, shapes, snapshots
from api.hf.door import Body, Caller, endpoint, is_true, json_of
from registry import selectors
from registry.errors import Fault, FileNotFound, RequestInvalid
from registry.models import File, Ref, Revision

LARGEST_PAGE = 1000
ORDERS = {"lastModified": "updated", "last_modified": "updated", "createdAt": "created", "created_at": "created"}
# True of everything here, so that asking for them narrows nothing.
EVERYWHERE = {"peft", "safetensors"}


@endpoint("GET", "HEAD")
def models(request: HttpRequest, caller: Caller) -> HttpResponseBase:
    """The catalogue, page by page; merges are left out."""
    limit = number(request, "limit", 100, least=1, most=LARGEST_PAGE)
    start = number(request, "cursor", 0, least=0, most=10**8)
    rows = list(selectors.search(caller.viewer, wanted(request.GET))[start : start + limit + 1])
    page = rows[:limit]
    heads = selectors.heads(page)
    files = selectors.files_by_revision(heads.values()) if is_true(request, "full") else None
    answer = []
    for expert in page:
        head = heads.get(expert.pk)
        own = None if files is None else files.get(head.pk, []) if head else []
        commit = head.commit if head else snapshots.EMPTY_COMMIT
        answer.append(shapes.model(expert, head, commit=commit, files=own))
    response = JsonResponse(answer, safe=False)
    if len(rows) > limit:
        response["Link"] = following(request, start + limit)
    return response


def wanted(query: QueryDict) -> selectors.Search:
    """The query of a client as a search of the catalogue. Raises RequestInvalid."""
    tags: list[str] = []
    base = licence = ""
    for word in clean(query.getlist("filter") + query.getlist("tags")):
        kind, _, value = word.partition(":")
        if kind == "base_model":
            base = value.rpartition(":")[2]
        elif kind == "license":
            licence = value
        elif word not in EVERYWHERE:
            tags.append(word)
    tags += clean([query.get("pipeline_tag", "")])
    sort = query.get("sort", "").lstrip("-") or "downloads"
    return selectors.Search(
        text="".join(clean([query.get("search", "")])),
        base_model=base,
        owner="".join(clean([query.get("author", "")])),
        tags=tuple(tags[:16]),
        licence=licence,
        sort=ORDERS.get(sort, "downloads"),
    )


def clean(words: list[str]) -> list[str]:
    return [word.replace("\0", "").strip()[:200] for word in words if word.strip()]


@endpoint("GET", "HEAD")
def model(request: HttpRequest, caller: Caller, full_name: str, rest: str = "main") -> HttpResponseBase:
    """One repository at a revision, with its files."""
    repository = selectors.repository(full_name, caller.viewer)
    revision, path = addresses.split(request, before=5, rest=rest) if rest != "main" else ("main", "")
    snapshot = snapshots.at(repository, f"{revision}/{path}" if path else revision, caller.viewer)
    blobs = is_true(request, "blobs")
    caller.headers |= snapshot.notice
    if snapshot.repository.merge is not None:
        files = snapshot.files() if snapshot.revision is not None else []
        answer = shapes.merge(snapshot.repository.merge, snapshot, files=files, blobs=blobs)
    else:
        assert repository.expert is not None
        pending = snapshot.pending
        answer = shapes.model(
            repository.expert,
            pending.found.source if pending else snapshot.revision,
            commit=snapshot.commit,
            files=[] if pending else snapshot.files(),
            blobs=blobs,
        )
        if pending:
            # Clients wait for a file, and some do not for this answer; so it is given without the sizes.
            answer["siblings"] = [{"rfilename": path} for path in snapshot.names()]
    # `merge--<id>` was asked of the expert, so the answer goes by the expert's name.
    answer |= {"id": repository.full_name, "modelId": repository.full_name}
    return JsonResponse(answer)


@endpoint("GET", "HEAD")
def refs(request: HttpRequest, caller: Caller, full_name: str) -> HttpResponseBase:
    repository = selectors.repository(full_name, caller.viewer)
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
    if repository.merge is not None:
        answer["branches"].append({"name": "main", "ref": "refs/heads/main", "targetCommit": repository.merge.commit})
    for ref in Ref.objects.filter(expert=repository.expert).select_related("revision").order_by("name"):
        kind, place = ("tags", "tags") if ref.kind == Ref.Kind.TAG else ("branches", "heads")
        commit = ref.revision.commit if ref.revision else snapshots.EMPTY_COMMIT
        answer[kind].append({"name": ref.name, "ref": f"refs/{place}/{ref.name}", "targetCommit": commit})
    if request.GET.get("include_prs"):
        answer["pullRequests"] = []
    return JsonResponse(answer)


@endpoint("GET", "HEAD")
def commits(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """The history of a revision, newest first."""
    snapshot = _snapshot(request, caller, full_name, rest)
    limit = number(request, "limit", 50, least=1, most=LARGEST_PAGE)
    page = number(request, "p", 0, least=0, most=10**6)
    revision = snapshot.content() if snapshot.pending else snapshot.revision
    line = selectors.ancestry(revision) if revision else []
    part = line[page * limit : (page + 1) * limit]
    rows = Revision.objects.select_related("author").in_bulk(part)
    response = JsonResponse([shapes.commit(rows[pk]) for pk in part], safe=False)
    response["X-Total-Count"] = str(len(line))
    if (page + 1) * limit < len(line):
        response["Link"] = following(request, page + 1, name="p")
    return response


@endpoint("GET", "HEAD")
def tree(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """Files and folders below a path."""
    repository = selectors.repository(full_name, caller.viewer)
    revision, path = addresses.split(request, before=5, rest=rest)
    snapshot = snapshots.at(repository, revision, caller.viewer)
    caller.headers["X-Repo-Commit"] = snapshot.commit
    files = below(snapshot.files(folder=path.rstrip("/")), path)
    changes = changes_of(files) if is_true(request, "expand") else {}
    is_recursive = is_true(request, "recursive")
    nodes = entries(files, path.rstrip("/"), is_recursive=is_recursive, changes=changes)
    limit = number(request, "limit", LARGEST_PAGE, least=1, most=LARGEST_PAGE)
    start = number(request, "cursor", 0, least=0, most=10**8)
    response = JsonResponse(nodes[start : start + limit], safe=False)
    if start + limit < len(nodes):
        response["Link"] = following(request, start + limit)
    return response


def below(files: Sequence[File], path: str) -> list[File]:
    """The files in a folder. Raises FileNotFound when there is no such folder."""
    folder = path.rstrip("/")
    if not folder:
        return list(files)
    found = [file for file in files if file.path.startswith(f"{folder}/")]
    if not found:
        raise FileNotFound(f"There is no folder {folder[:200]!r}.")
    return found


def entries(
    files: Sequence[File], folder: str, *, is_recursive: bool, changes: Mapping[str, Revision]
) -> list[dict[str, Any]]:
    """Nodes below a folder: its files and folders, and theirs when the listing is recursive.

    `changes` adds to each node the newest commit that touched it.
    """
    nodes: list[dict[str, Any]] = []
    depth = folder.count("/") + 1 if folder else 0

    def head(file: File) -> str:
        return "/".join(file.path.split("/")[: depth + 1])

    for path, group in groupby(sorted(files, key=lambda file: file.path.split("/")), key=head):
        members = list(group)
        if len(members) == 1 and members[0].path == path:
            nodes.append(shapes.node(members[0], newest(members, changes)))
            continue
        nodes.append(shapes.folder(path, members, newest(members, changes)))
        if is_recursive:
            nodes += entries(members, path, is_recursive=True, changes=changes)
    return nodes


def changes_of(files: Sequence[File]) -> dict[str, Revision]:
    """For each file the newest commit that changed it."""
    return selectors.last_changes(files[0].revision) if files else {}


def newest(files: Sequence[File], changes: Mapping[str, Revision]) -> dict[str, Any] | None:
    """The newest commit among those that changed the files; None when it was not asked for."""
    known = [changes[file.path] for file in files if file.path in changes]
    return shapes.last_commit(max(known, key=lambda revision: revision.pk)) if known else None


@endpoint("POST")
def paths_info(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """Nodes of the paths that exist; unknown ones are left out."""
    snapshot = _snapshot(request, caller, full_name, rest)
    caller.headers["X-Repo-Commit"] = snapshot.commit
    paths, expand = _paths(request)
    files = snapshot.files()
    changes = changes_of(files) if expand else {}
    by_path = {file.path: file for file in files}
    nodes = []
    for path in dict.fromkeys(path.strip("/") for path in paths):
        if path in by_path:
            nodes.append(shapes.node(by_path[path], newest([by_path[path]], changes)))
        elif members := [file for file in files if file.path.startswith(f"{path}/")]:
            nodes.append(shapes.folder(path, members, newest(members, changes)))
    return JsonResponse(nodes, safe=False)


def _paths(request: HttpRequest) -> tuple[list[str], bool]:
    """Paths and `expand` of a body that is a form or JSON. Raises RequestMalformed, RequestInvalid, TooLarge."""
    if request.content_type == "application/json":
        record = json_of(request)
        paths = record.get("paths", [])
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise RequestInvalid("The paths are no texts.", faults=[Fault("/paths", None, "a list of texts")])
        return paths, record.get("expand") is True
    form = QueryDict(Body(request).whole(limit_bytes=settings.HUB_JSON_MAX_BYTES), encoding="utf-8")
    return form.getlist("paths"), form.get("expand", "").lower() in {"true", "1"}


def _snapshot(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> snapshots.Snapshot:
    repository = selectors.repository(full_name, caller.viewer)
    revision, path = addresses.split(request, before=5, rest=rest)
    return snapshots.at(repository, f"{revision}/{path}" if path else revision, caller.viewer)


def number(request: HttpRequest, name: str, default: int, *, least: int, most: int) -> int:
    """A whole number of the query; one that is too large counts as the largest. Raises RequestInvalid."""
    text = request.GET.get(name, "")
    if text in {"", "None"}:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise RequestInvalid(
            f"The query parameter {name} is not valid.",
            faults=[Fault(f"?{name}", text[:40], f"a whole number from {least} to {most}")],
        )
    return min(int(text), most)


def following(request: HttpRequest, place: int, *, name: str = "cursor") -> str:
    """The Link header that leads to the next page, absolute as clients want it."""
    query = {**{key: request.GET.getlist(key) for key in request.GET}, name: place}
    address = addresses.raw_path(request) or request.path
    return f'<{request.build_absolute_uri(f"{address}?{urlencode(query, doseq=True)}")}>; rel="next"'
