"""Revision and path out of an address: both may hold an encoded slash, which the decoded path no longer shows."""

from urllib.parse import unquote

from django.http import HttpRequest

from registry.errors import RevisionNotFound

# Git's own places for names. A revision of one of these forms has this many parts.
LONG_FORMS = {"refs/heads": 3, "refs/tags": 3, "refs/pr": 3, "refs/convert": 3}


def split(request: HttpRequest, *, before: int, rest: str) -> tuple[str, str]:
    """Revision and path, where `before` segments stand in front of them and `rest` is what follows, decoded.

    gunicorn gives the address as it was sent. Without that, a revision with a slash is known in git's long forms alone.
    """
    raw = raw_path(request)
    if raw is not None:
        segments = raw.lstrip("/").split("/", before + 1)
        if len(segments) > before and unquote("/".join(segments[before:])) == rest:
            path = segments[before + 1] if len(segments) > before + 1 else ""
            return plain(unquote(segments[before])), unquote(path)
    parts = rest.split("/")
    count = LONG_FORMS.get("/".join(parts[:2]), 1)
    return plain("/".join(parts[:count])), "/".join(parts[count:])


def raw_path(request: HttpRequest) -> str | None:
    """The path as the client sent it, percent-encoded; None where the server does not tell."""
    address = request.META.get("RAW_URI")
    if not isinstance(address, str):
        return None
    if not address.startswith("/"):  # the absolute form, as sent to a proxy
        address = "/" + address.partition("://")[2].partition("/")[2]
    return address.partition("?")[0]


def plain(revision: str) -> str:
    """A branch or tag without git's long form; other refs are unknown here."""
    for prefix in ("refs/heads/", "refs/tags/"):
        if revision.startswith(prefix):
            return revision.removeprefix(prefix)
    if not revision or "\0" in revision:
        raise RevisionNotFound("An empty revision.")
    return revision
