"""How pages write sizes, figures and Markdown."""

from typing import Any

import nh3
from django import template
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt

from frontend import charts

register = template.Library()
PARTS = {
    "s_ex": "Cosine with the nearest example",
    "s_desc": "Cosine with name and description",
    "s_cen": "Cosine with the middle of the examples",
    "s_ins": "Cosine with the written instruction",
    "s_tag": "Cosine with the middle of the experts that share a tag",
    "bm25": "Words in common, rare ones counting more",
}
TAGS = {
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "em", "strong", "code", "pre", "blockquote", "hr", "br",
    "table", "thead", "tbody", "tr", "th", "td", "a", "del",
}  # fmt: skip
markdown_parser = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")


@register.filter
def bytes_size(length: int | None) -> str:
    """1.3 MB, 48 KB; decimal units as clients print them."""
    if length is None:
        return "–"
    size = float(length)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


@register.filter
def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


@register.filter
def share(density: float | None) -> str:
    """0.05 as 5 %."""
    return "–" if density is None else charts.share_text(density)


@register.filter
def count(number: int | None) -> str:
    """29496 as 29,496."""
    return "–" if number is None else f"{number:,}"


@register.filter
def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}x"


@register.filter
def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


@register.filter
def ratio(original: int, small: int) -> str:
    return f"{original / small:.1f}x" if small else "–"


@register.filter
def part_says(name: str) -> str:
    """What a part of a score is, in words."""
    return PARTS.get(name, "A part of the score")


@register.filter
def grade(quality: str) -> str:
    """The colour of low, fair and good."""
    return {"good": "high", "fair": "medium"}.get(quality, "low")


@register.filter
def get(mapping: dict[str, Any] | None, name: str) -> Any:
    return (mapping or {}).get(name)


@register.filter
def markdown(text: str) -> SafeString:
    """Markdown as clean HTML: no raw HTML, no images, no scripts, links that leak nothing."""
    rendered = markdown_parser.render(text)
    clean = nh3.clean(rendered, tags=TAGS, attributes={"a": {"href"}}, url_schemes={"http", "https", "mailto"})
    return mark_safe(clean)  # noqa: S308 - cleaned on the line above
