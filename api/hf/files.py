"""Files of a revision, as download clients fetch them."""

from urllib.parse import quote

from django.http import HttpRequest, HttpResponseBase, HttpResponseRedirect

from api import downloads as answers
from api.hf import addresses, snapshots
from api.hf.door import Caller, endpoint
from registry.services import downloads, merges


@endpoint("GET", "HEAD")
def page(request: HttpRequest, _caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """Lead a person from the addresses that clients print (a commit, a file) to the page of that revision."""
    revision, _ = addresses.split(request, before=3, rest=rest)
    return HttpResponseRedirect(f"/{full_name}/tree/{quote(revision, safe='')}")


@endpoint("GET", "HEAD")
def resolve(request: HttpRequest, caller: Caller, full_name: str, rest: str) -> HttpResponseBase:
    """The bytes of a file, whole or in part; HEAD tells commit, size and digest."""
    revision, path = addresses.split(request, before=3, rest=rest)
    found = snapshots.present(full_name, revision, path, caller.viewer)
    snapshot = found[0] if found else snapshots.find(full_name, revision, caller.viewer)
    # With the commit on a 404, clients remember that the file is absent.
    caller.headers |= {"X-Repo-Commit": snapshot.commit, **snapshot.notice}
    file = found[1] if found else snapshot.file(path)
    if snapshot.repository.merge is not None:
        merges.note_read(snapshot.repository.merge)
    headers = {}
    if file.is_large:
        headers = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.blob.size_bytes)}
    response = answers.respond(
        request,
        blob=file.blob,
        etag=file.etag,
        filename=path.rpartition("/")[2],
        commit=snapshot.commit,
        is_private=snapshot.is_private,
        is_fixed=revision == snapshot.commit,
        headers=headers,
    )
    # A client in several streams asks for one range each: the one that starts the file counts.
    starts_file = response.get("Content-Range", "bytes 0-").startswith("bytes 0-")
    if request.method == "GET" and response.status_code in {200, 206} and starts_file:
        downloads.count(file)
    return response
