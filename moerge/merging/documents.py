"""Recipes as texts: YAML and JSON, and mergekit's YAML, to the values that a recipe is parsed from.

YAML is read as plain data: no tags, no anchors, no aliases, one document, keys that are texts and stand once. Words and
numbers are those of YAML 1.2, so that `1e-5` is a number and `no` a word, as in JSON.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from moerge.errors import RecipeInvalid
from moerge.merging import mergekit
from moerge.tensors import strict

LARGEST_BYTES = 256 * 1024
DEEPEST = 32
MOST_VALUES = 20_000

# Longer runs of digits are no numbers of a recipe; the hexadecimal name of a commit may look like one.
_WHOLE = re.compile(r"[-+]?[0-9]{1,19}")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
# libyaml is ten times faster where it is there.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(text: str | bytes, *, kind: Literal["yaml", "json"] | None = None) -> dict[str, Any]:
    """The values of a recipe, as `moerge.merging.recipe.parse` and a hub take them; mergekit's form is translated.

    Without a `kind` a text that begins with a brace is JSON and every other one YAML. Raises RecipeInvalid, which names
    the line where the text itself is at fault, and the field where it says what cannot be said here.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > LARGEST_BYTES:
        raise _invalid("The recipe is too long", f"{len(data)} bytes", f"at most {LARGEST_BYTES} bytes")
    if kind is None:
        kind = "json" if data.lstrip()[:1] == b"{" else "yaml"
    found = _json(data) if kind == "json" else _yaml(data)
    if not isinstance(found, dict):
        raise _invalid("The recipe is no mapping", type(found).__name__, "fields such as method and experts")
    return mergekit.translate(found) if mergekit.is_meant(found) else found


def _json(data: bytes) -> Any:
    try:
        return strict.loads(data, max_keys=MOST_VALUES, max_depth=DEEPEST)
    except strict.Malformed as error:
        raise _invalid(f"The recipe is not strict JSON: {error}", str(error), "strict JSON") from error


def _yaml(data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _invalid(f"Line {line}: byte {error.start} is not UTF-8", "other bytes", "UTF-8") from error
    try:
        return _built(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"Line {mark.line + 1}: "
        what = error.problem or error.context or "it cannot be read"
        raise _invalid(f"{where}the recipe is not YAML: {what}", str(what), "YAML") from error
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1
        raise _invalid(
            f"Line {line}: the recipe holds a character that YAML does not allow", "a character", "text"
        ) from error


@dataclass
class _Open:
    """A mapping or list that is being read: where it stands, what it holds, and the key that waits for its value."""

    pointer: str
    values: Any
    key: str | None = None
    seen: set[str] = field(default_factory=set)
    is_outermost: bool = False

    @property
    def wants_key(self) -> bool:
        return isinstance(self.values, dict) and self.key is None

    def place(self) -> str:
        """The pointer of the value that comes next."""
        if self.is_outermost:
            return ""
        return f"{self.pointer}/{len(self.values) if isinstance(self.values, list) else self.key}"

    def take(self, value: Any) -> None:
        if isinstance(self.values, list):
            self.values.append(value)
        else:
            self.values[self.key] = value
            self.key = None


def _built(events: Iterator[Any]) -> Any:
    """The value of a document, from what the parser meets in it. Raises RecipeInvalid with line and pointer."""
    root = _Open("", [], is_outermost=True)
    stack = [root]
    for count, event in enumerate(events):
        top = stack[-1]
        if count == MOST_VALUES:
            raise _fault(event, top, "there are too many values", met=f"more than {MOST_VALUES}", wanted="fewer")
        if isinstance(event, yaml.DocumentStartEvent) and root.values:
            raise _fault(event, top, "a second document begins", met="two documents", wanted="one document")
        if isinstance(event, yaml.NodeEvent):
            _check_plain(event, top)
        if isinstance(event, yaml.ScalarEvent):
            _take_scalar(event, top)
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append(_opened(event, top, depth=len(stack)))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            stack[-1].take(done.values)
    return root.values[0] if root.values else None


def _opened(event: Any, top: _Open, *, depth: int) -> _Open:
    if top.wants_key:
        raise _fault(event, top, "a key is no text", met="a mapping or list", wanted="a text")
    if depth > DEEPEST:
        raise _fault(event, top, "values are nested too deeply", met="more", wanted=f"{DEEPEST} levels")
    values: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
    return _Open(top.place(), values)


def _check_plain(event: Any, top: _Open) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise _fault(event, top, "an alias refers to another part", met="an alias", wanted="the value written out")
    if event.anchor is not None:
        raise _fault(event, top, "an anchor names a part", met=f"&{event.anchor}"[:80], wanted="no anchor")
    if getattr(event, "tag", None) is not None:
        raise _fault(event, top, "a tag asks for a type", met=str(event.tag)[:80], wanted="no tag")


def _take_scalar(event: Any, top: _Open) -> None:
    if not top.wants_key:
        top.take(_scalar(event, top))
        return
    key = _scalar(event, top)
    if not isinstance(key, str):
        raise _fault(event, top, "a key is no text", met=event.value[:80], wanted="a text")
    if key in top.seen:
        raise _fault(event, top, f"the key {key[:80]!r} appears twice", met=key[:80], wanted="every key once")
    top.seen.add(key)
    top.key = key


def _scalar(event: Any, top: _Open) -> Any:
    """A text, or what a plain word means."""
    text: str = event.value
    if event.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _REAL.fullmatch(text) and not text.isdigit():
        value = float(text)
        if not math.isfinite(value):
            raise _fault(event, top, "a number is too large", met=text[:80], wanted="a finite number")
        return value
    if _NOT_FINITE.fullmatch(text):
        raise _fault(event, top, "a number is not finite", met=text, wanted="a finite number")
    return text


def _fault(event: Any, top: _Open, what: str, *, met: str, wanted: str) -> RecipeInvalid:
    line = event.start_mark.line + 1
    pointer = top.pointer if top.wants_key else top.place()
    return _invalid(f"Line {line}: {what}", met, wanted, pointer=pointer)


def _invalid(detail: str, met: str, wanted: str, *, pointer: str = "") -> RecipeInvalid:
    return RecipeInvalid(
        f"{detail}.", pointer=pointer, met=met, wanted=wanted, remedy=f"Correct the recipe: give {wanted}."
    )
