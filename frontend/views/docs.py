"""The documentation, as it lies in docs/."""

import re

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.safestring import mark_safe

from frontend.templatetags.hub import markdown
from frontend.views.common import page as shown
from registry.errors import NotFound

HEADING = re.compile(r"<h([1-4])>(.*?)</h\1>")
# Pages name each other as files, so that they can be read where they lie.
LINK = re.compile(r'href="((?:\.\./)?(?:methods/)?[a-z0-9_-]+)\.md')


@shown
def index(request: HttpRequest) -> HttpResponse:
    files = sorted((settings.ROOT / "docs").glob("*.md"))
    pages = [(path.stem, path.read_text().partition("\n")[0].lstrip("# ")) for path in files]
    return render(request, "hub/docs.html", {"pages": pages})


@shown
def page(request: HttpRequest, page: str, folder: str = "") -> HttpResponse:
    path = settings.ROOT / "docs" / folder / f"{page}.md"
    if not path.is_file():
        raise NotFound(f"There is no page {page[:60]!r} in the documentation.")
    body = LINK.sub(r'href="\1', HEADING.sub(with_anchor, markdown(path.read_text())))
    return render(request, "hub/docs_page.html", {"name": page, "body": mark_safe(body)})  # noqa: S308 - our own files, cleaned


def with_anchor(match: "re.Match[str]") -> str:
    """Give a heading the id that links and problem types point at."""
    level, text = match.groups()
    plain = re.sub(r"<[^>]+>", "", text)
    anchor = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return f'<h{level} id="{anchor}">{text}</h{level}>'
