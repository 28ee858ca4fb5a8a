"""A stored file as an HTTP answer: validators, ranges, and headers that keep a browser from running it."""

from collections.abc import Mapping

from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.utils.http import content_disposition_header

from registry.models import Blob
from registry.services import downloads


def respond(
    request: HttpRequest,
    *,
    blob: Blob,
    etag: str,
    filename: str,
    commit: str,
    is_private: bool,
    is_fixed: bool = False,
    headers: Mapping[str, str] | None = None,
) -> HttpResponseBase:
    """The bytes of a blob as the request's conditions and range ask for them.

    200 whole, 206 a part, 304 when the caller has it, 412 when its precondition fails. `is_fixed` says that the
    address names a commit, so that the answer never changes. Raises RangeUnsatisfiable.
    """
    every = {
        "ETag": f'"{etag}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": caching(is_private=is_private, is_fixed=is_fixed),
        "X-Repo-Commit": commit,
        "Content-Disposition": content_disposition_header(as_attachment=True, filename=filename) or "",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        **(headers or {}),
    }
    if (present := request.headers.get("If-Match")) is not None and not names(present, etag, is_weak_enough=False):
        return HttpResponse(status=412, headers=every)
    if (known := request.headers.get("If-None-Match")) is not None and names(known, etag, is_weak_enough=True):
        return HttpResponse(status=304, headers=every)
    media_type = downloads.media_type(filename)
    if request.method == "HEAD":
        return HttpResponse(headers=every | {"Content-Length": str(blob.size_bytes)}, content_type=media_type)
    part = _part(request, etag, blob.size_bytes)
    response = _body(downloads.open_blob(blob, byte_range=part), media_type)
    for name, value in every.items():
        response[name] = value
    return response


def caching(*, is_private: bool, is_fixed: bool) -> str:
    """Others may keep public bytes; private ones are kept by nobody."""
    if is_private:
        return "private, no-store"
    return "public, max-age=31536000, immutable" if is_fixed else "public, no-cache"


def _part(request: HttpRequest, etag: str, size_bytes: int) -> downloads.ByteRange | None:
    """The range to send; one that was asked for on condition of another ETag is not."""
    if (condition := request.headers.get("If-Range")) is not None and condition.strip() != f'"{etag}"':
        return None
    return downloads.parse_range(request.headers.get("Range"), size_bytes)


def _body(download: downloads.Download, media_type: str) -> HttpResponseBase:
    response: StreamingHttpResponse
    if download.part.stop == download.size_bytes:
        # Up to the end of the file: the server may hand the descriptor to the kernel (sendfile).
        response = FileToEnd(download.stream, content_type=media_type)
    else:
        response = StreamingHttpResponse(download, content_type=media_type)
    response["Content-Length"] = str(download.part.length)
    if download.is_partial:
        response.status_code = 206
        part = download.part
        response["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{download.size_bytes}"
    return response


class FileToEnd(FileResponse):
    """An open file from where it stands."""

    block_size = downloads.BLOCK_BYTES


def names(header: str, etag: str, *, is_weak_enough: bool) -> bool:
    """Whether a list of entity tags names this one."""
    if header.strip() == "*":
        return True
    given = [tag.strip() for tag in header.split(",")]
    if is_weak_enough:
        given = [tag.removeprefix("W/") for tag in given]
    return f'"{etag}"' in given
