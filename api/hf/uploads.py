"""Commits of stock clients: every file travels inside the commit, in base64 (`uploadMode: regular`)."""

import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponseBase, JsonResponse

from api.hf import addresses, ndjson, snapshots
from api.hf.door import Body, Caller, endpoint, header_text, is_true, json_of, site, text_of
from api.hf.identity import unavailable
from api.hf.repositories import writable
from registry import selectors
from registry.checks import files as rules
from registry.errors import Fault, RequestMalformed, RevisionNotFound
from registry.models import Blob, Expert, Ref, User
from registry.services import blobs, revisions

NO_PULL_REQUESTS = "This hub has no pull requests; commit to a branch."
JSON_LINE_BYTES = 1 << 20


@endpoint("POST")
def preupload(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """How each file is to be sent, which are the same already, and which are better left out."""
    user, expert = writable(caller, full_name)
    if is_true(request, "create_pr"):
        return unavailable(NO_PULL_REQUESTS)
    branch = branch_of(request, expert, rest)
    present = {file.path: file.blob.git_sha1 for file in snapshots.find(full_name, branch, user).files()}
    answers = []
    left_out = []
    for place, given in enumerate(_list_of(json_of(request), "files")):
        if not isinstance(given, dict):
            raise RequestMalformed("A file is no object.", faults=[Fault(f"/files/{place}", given, "{path, size}")])
        path = text_of(given, "path")
        why = rules.leftover(path)
        if why:
            left_out.append(why)
        answer = {"path": path, "uploadMode": "regular", "shouldIgnore": bool(why)}
        # The caller may read this tree, so its digests are no secret; a blob elsewhere is never told.
        answers.append(answer | ({"oid": present[path]} if path in present else {}))
    response = JsonResponse({"files": answers})
    if left_out:
        response["X-HF-Warning"] = header_text("leftovers; " + " ".join(left_out).replace(";", ","))
    return response


@dataclass
class Commit:
    """What the lines of a commit ask for."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    added: dict[str, blobs.Staged | Blob] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        return f"{self.summary}\n\n{self.description}".strip()

    @property
    def changes(self) -> revisions.Changes:
        return revisions.Changes(self.added, tuple(self.deleted), tuple(self.deleted_folders))


@endpoint("POST")
def commit(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """Take files and deletions as one new revision of a branch. The same tree on the same parent is the same commit."""
    user, expert = writable(caller, full_name)
    if is_true(request, "create_pr"):
        return unavailable(NO_PULL_REQUESTS)
    branch = branch_of(request, expert, rest)
    limits = ndjson.Limits(
        line_bytes=JSON_LINE_BYTES,
        file_bytes=settings.HUB_FILE_MAX_BYTES,
        total_bytes=settings.HUB_UPLOAD_MAX_BYTES,
        lines=4 * settings.HUB_UPLOAD_MAX_FILES,
    )
    reader = ndjson.Reader(Body(request), limits)
    staged_here: list[blobs.Staged] = []
    try:
        wanted = Commit()
        for number, record in enumerate(reader):
            _apply(record, number, wanted, staged_here, user)
        _check_header(wanted)
        made = revisions.commit(
            user=user,
            expert=expert,
            changes=wanted.changes,
            message=wanted.message,
            branch=branch,
            parent_commit=_parent(wanted, expert, branch),
        )
    finally:
        reader.discard()
        for staged in staged_here:
            staged.discard()
    answer = {
        "success": True,
        "commitOid": made.commit,
        "commitUrl": f"{site(request)}/{expert.full_name}/commit/{made.commit}",
        "hookOutput": "",
    }
    return JsonResponse(answer)


def branch_of(request: HttpRequest, expert: Expert, rest: str) -> str:
    """The branch in the address; a tag or a commit takes no further commit. Raises RevisionNotFound."""
    name, path = addresses.split(request, before=5, rest=rest)
    if path or not Ref.objects.filter(expert=expert, name=name, kind=Ref.Kind.BRANCH).exists():
        raise RevisionNotFound(f"{expert.full_name} has no branch {name[:80]!r}.")
    return name


def _apply(record: dict[str, Any], number: int, wanted: Commit, staged: list[blobs.Staged], user: User) -> None:
    """Take one line of a commit. Raises RequestMalformed, UploadInvalid, TooLarge."""
    value = record.get("value")
    if not isinstance(value, dict):
        raise RequestMalformed("A line has no value.", faults=[Fault(f"/{number}/value", value, "an object")])
    match record.get("key"):
        case "header":
            wanted.summary = text_of(value, "summary", "")
            wanted.description = text_of(value, "description", "")
            wanted.parent = text_of(value, "parentCommit", "") or None
        case "file":
            wanted.added[text_of(value, "path")] = _content(value, number, staged)
        case "lfsFile":
            wanted.added[text_of(value, "path")] = _stored(value, user)
        case "deletedFile":
            wanted.deleted.append(text_of(value, "path"))
        case "deletedFolder":
            wanted.deleted_folders.append(text_of(value, "path").rstrip("/"))
        case unknown:
            known = ["header", "file", "lfsFile", "deletedFile", "deletedFolder"]
            raise RequestMalformed(
                f"The key of line {number} is not known.", faults=[Fault(f"/{number}/key", unknown, known)]
            )


def _content(value: Mapping[str, Any], number: int, staged: list[blobs.Staged]) -> blobs.Staged:
    """The bytes of a file line: staged already when they were many."""
    if value.get("encoding", "base64") != "base64":
        raise RequestMalformed(
            "The encoding is not known.", faults=[Fault(f"/{number}/value/encoding", value["encoding"], "base64")]
        )
    content = value.get("content")
    if isinstance(content, blobs.Staged):
        return content
    if not isinstance(content, str):
        raise RequestMalformed("A file has no content.", faults=[Fault(f"/{number}/value/content", None, "base64")])
    try:
        data = binascii.a2b_base64(content.encode(), strict_mode=True)
    except binascii.Error as error:
        raise ndjson.not_base64() from error
    small = blobs.stage_bytes(data)
    staged.append(small)
    return small


def _stored(value: Mapping[str, Any], user: User) -> Blob:
    """Bytes that are in the storage already, as a copy names them: only those that the caller may read somewhere.

    To anybody else they are as good as absent, so that knowing a digest opens nothing.
    """
    oid = str(value.get("oid", ""))
    blob = Blob.objects.filter(sha256=oid).first() if len(oid) == 64 and oid.isalnum() else None
    size = value.get("size")
    if blob is None or not selectors.may_read_blob(user, oid) or size not in {None, blob.size_bytes}:
        raise RequestMalformed(
            f"No bytes with digest {oid[:64]!r} were uploaded.",
            faults=[Fault("/oid", oid[:64], "a digest you uploaded", "Send the file inside the commit.", "S6")],
        )
    return blob


def _parent(wanted: Commit, expert: Expert, branch: str) -> str | None:
    """The commit that the caller believes to be the head; the empty tree is the parent of a first commit."""
    if wanted.parent == snapshots.EMPTY_COMMIT and revisions.branch_head(expert, branch) is None:
        return None
    return wanted.parent


def _check_header(wanted: Commit) -> None:
    if not wanted.summary:
        raise RequestMalformed(
            "The commit has no summary.", faults=[Fault("/0/value/summary", wanted.summary, "a line of text")]
        )


def _list_of(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise RequestMalformed(f"The field {name} is no list.", faults=[Fault(f"/{name}", value, "a list")])
    return value
