"""The card of an expert: README.md with YAML front matter in the words of the Hugging Face Hub and a section of ours.

license: cc-by-4.0
base_model: sentence-transformers/all-MiniLM-L6-v2
moerge:
  task: What the expert is good at, in a few sentences.
  examples: [inputs it should get]
  instruction: What it does, as an order to somebody.
  compression: {preset: default, density: 0.1}
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from registry.checks import compression, files
from registry.checks.compression import Choice
from registry.errors import Fault, UploadInvalid

FRONT_MATTER_BYTES = 64_000
DESCRIPTION_CHARACTERS = 60_000
EXAMPLES_COUNT, EXAMPLE_CHARACTERS = 32, 4_000
INSTRUCTION_CHARACTERS = 4_000
TAGS_COUNT, TAG_CHARACTERS = 64, 80
LICENCE_CHARACTERS = 64
FIGURES_COUNT = 200
DEPTH = 32
FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"\[More Information Needed\]|<!--.*?-->", re.DOTALL)
DESCRIBING = re.compile(r"[^\n]*\b(description|summary|about|overview|task|intended use)\b", re.IGNORECASE)
UNTOUCHED = re.compile(r"\b(base|baseline|untouched)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Figure:
    """A measured value that the card states; `base_value` is the untouched base on the same rows.

    `preset` and `density` name the compressed form that was measured; None is the original.
    """

    dataset: str
    metric: str
    value: float
    base_value: float | None = None
    row_count: int | None = None
    preset: str | None = None
    density: float | None = None


@dataclass(frozen=True)
class Card:
    """What a card says, checked; empty where it says nothing."""

    description: str = ""
    examples: tuple[str, ...] = ()
    instruction: str = ""
    licence: str = ""
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    # How it wants to be compressed; None leaves that to the hub.
    compression: Choice | None = None
    # The whole front matter as JSON values, for clients that show it.
    data: Mapping[str, Any] = field(default_factory=dict)
    body: str = ""


def parse(text: str) -> Card:
    """The card in the text of a README.md. Raises UploadInvalid where the front matter breaks a rule."""
    found = FRONT.match(text)
    data = _front_matter(found[1]) if found else {}
    body = text[found.end() :] if found else text
    section = _mapping(data.get("moerge"), "moerge")
    description = section.get("task", section.get("description"))
    base = data.get("base_model")
    if isinstance(base, list):
        base = base[0] if len(base) == 1 else None
    licence = data.get("license", data.get("licence"))
    return Card(
        description=_text(description, "moerge", "task") if description else first_paragraph(body),
        examples=_texts(section.get("examples"), EXAMPLES_COUNT, EXAMPLE_CHARACTERS, "moerge", "examples"),
        instruction=_instruction(section.get("instruction"), files.CARD, "moerge", "instruction"),
        licence=" and ".join(_texts(licence, 8, LICENCE_CHARACTERS, "license")).lower()[:LICENCE_CHARACTERS],
        base_model=_text(base, "base_model") if base else None,
        tags=_tags(data.get("tags")),
        figures=tuple(_figures(data))[:FIGURES_COUNT],
        compression=_compression(section.get("compression")),
        data=data,
        body=body,
    )


def overrides(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Card fields given beside the files, checked like the card itself; they win over it. Raises UploadInvalid."""
    known = {"description", "examples", "instruction", "licence", "base_model", "tags", "compression"}
    for name in claims.keys() - known:
        raise _invalid(
            ("card", name), met=name, wanted=f"one of {', '.join(sorted(known))}", remedy="Leave this field out."
        )
    result: dict[str, Any] = {}
    for name in ("description", "base_model", "licence"):
        if claims.get(name):
            result[name] = _text(claims[name], name, file="card")
    if len(result.get("licence", "")) > LICENCE_CHARACTERS:
        raise _invalid(
            ("card", "licence"),
            met=len(result["licence"]),
            wanted=f"at most {LICENCE_CHARACTERS} characters",
            remedy="Name it by its identifier.",
        )
    if claims.get("examples"):
        result["examples"] = list(
            _texts(claims["examples"], EXAMPLES_COUNT, EXAMPLE_CHARACTERS, "examples", file="card")
        )
    if claims.get("instruction"):
        result["instruction"] = _instruction(claims["instruction"], "card", "instruction")
    if claims.get("tags"):
        result["tags"] = list(_texts(claims["tags"], TAGS_COUNT, TAG_CHARACTERS, "tags", file="card"))
    if claims.get("compression"):
        chosen = compression.parse(claims["compression"], pointer="/compression/", error=UploadInvalid)
        result["compression"] = chosen.as_dict()
    return result


def merged(card: Card, given: Mapping[str, Any]) -> Card:
    """A card with the fields that were given beside it."""
    return Card(
        description=given.get("description", card.description),
        examples=tuple(given.get("examples", card.examples)),
        instruction=given.get("instruction", card.instruction),
        licence=given.get("licence", card.licence).lower(),
        base_model=given.get("base_model", card.base_model),
        tags=tuple(given.get("tags", card.tags)),
        figures=card.figures,
        compression=Choice.of(given["compression"]) if "compression" in given else card.compression,
        data=card.data,
        body=card.body,
    )


def first_paragraph(body: str) -> str:
    """The first paragraph of prose that describes: before the first section, or in one that is called so.

    Template cards have prose of their own in other sections, which says nothing about this expert.
    """
    text = PLACEHOLDER.sub("", body.replace("\r\n", "\n"))
    start, *sections = re.split(r"^##+[ \t]*", text, flags=re.MULTILINE)
    told = [section.partition("\n")[2] for section in sections if DESCRIBING.match(section)]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join([start, *told])):
        words = " ".join(line.strip() for line in paragraph.splitlines() if not line.lstrip().startswith("#")).strip()
        if words and not re.match(r"[-*|>`!<\[]|\d+\.", words):
            return words[:DESCRIPTION_CHARACTERS]
    return ""


def _tags(value: Any) -> tuple[str, ...]:
    """The tags of a card; libraries write some by themselves, so one that is too long is left out, not refused."""
    items = value if isinstance(value, list) else [value]
    texts = [str(item).strip() for item in items if isinstance(item, str | int | float) and not isinstance(item, bool)]
    fitting = [text for text in texts if text and len(text) <= TAG_CHARACTERS]
    return tuple(dict.fromkeys(fitting))[:TAGS_COUNT]


class _Loader(yaml.SafeLoader):
    """Safe YAML without anchors (they multiply), deep nesting and duplicate keys (readers disagree on them)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError(f"nested more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - yaml's signature
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"the key {str(key.value)[:80]!r} appears twice")
            if isinstance(key.value, str):
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _front_matter(text: str) -> dict[str, Any]:
    size_bytes = len(text.encode())
    if size_bytes > FRONT_MATTER_BYTES:
        raise _invalid(
            (),
            met=f"{size_bytes} bytes of front matter",
            wanted=f"at most {FRONT_MATTER_BYTES} bytes",
            remedy="Move long texts below the front matter.",
        )
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise _invalid(
                (),
                met=type(data).__name__,
                wanted="a mapping of names to values",
                remedy="Write `name: value` lines between the --- lines.",
            )
        # Dates become text; what JSON cannot hold (NaN, binary, sets) is refused here rather than by every reader.
        plain: dict[str, Any] = json.loads(json.dumps(data, default=_as_text, allow_nan=False))
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        met = " ".join(str(error).split())[:200] or type(error).__name__
        raise _invalid(
            (), met=met, wanted="YAML of plain values", remedy="Correct the front matter of README.md."
        ) from error
    if "\\u0000" in json.dumps(plain):
        raise _invalid((), met="a NUL character", wanted="text", remedy="Remove the NUL character.")
    return plain


def _as_text(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"a value of type {type(value).__name__}")


def _figures(data: Mapping[str, Any]) -> Iterator[Figure]:
    """Figures of `model-index` as the Hub writes them: base and expert are told apart by the metric's name."""
    for model in _dicts(data.get("model-index")):
        for result in _dicts(model.get("results")):
            dataset = result.get("dataset")
            dataset = dataset if isinstance(dataset, dict) else {}
            name = str(dataset.get("name") or dataset.get("type") or "")[:200]
            yield from _figures_of(name, _dicts(result.get("metrics")))


def _figures_of(dataset: str, metrics: list[dict[str, Any]]) -> Iterator[Figure]:
    base: dict[str, float] = {}
    own: list[tuple[str, float, int | None, Choice | None]] = []
    for metric in metrics:
        kind, value = str(metric.get("type") or metric.get("name") or "")[:80], metric.get("value")
        if not kind or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if UNTOUCHED.search(str(metric.get("name", ""))):
            base[kind] = float(value)
        else:
            arguments = metric.get("args")
            arguments = arguments if isinstance(arguments, dict) else {}
            count = arguments.get("n")
            try:
                form = _form_of(arguments.get("compression"))
            except UploadInvalid:
                # Of a form that nobody knows; it must not pass for a figure of the original.
                continue
            own.append((kind, float(value), count if type(count) is int and 0 < count < 2**31 else None, form))
    for kind, value, count, form in own:
        preset, density = (form.preset, form.density) if form else (None, None)
        yield Figure(dataset, kind, value, base.get(kind), count, preset, density)


def _form_of(value: Any) -> Choice | None:
    """The compressed form that `args: {compression: {preset, density}}` of a metric names; None without one."""
    if value is None:
        return None
    chosen = _compression(value)
    if chosen is None or (chosen.density is None and chosen.preset != compression.INT4):
        raise _invalid((), met="no density", wanted="a density", remedy="Name preset and density.")
    return replace(chosen, density=chosen.density or compression.INT4_DENSITY)


def _compression(value: Any) -> Choice | None:
    """What the card says under `moerge: compression:`. Raises UploadInvalid."""
    if value is None:
        return None
    where = ("moerge", "compression")
    claims = _mapping(value, *where)
    return compression.parse(claims, pointer=files.pointer_of(files.CARD, *where, ""), error=UploadInvalid)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _mapping(value: Any, *where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(
            (files.CARD, *where),
            met=type(value).__name__,
            wanted="a mapping",
            remedy="Write `task:` and `examples:` below it.",
        )
    return value


def _instruction(value: Any, file: str, *where: str) -> str:
    if not value:
        return ""
    text = _text(value, *where, file=file).strip()
    if len(text) > INSTRUCTION_CHARACTERS:
        raise _invalid(
            (file, *where),
            met=len(text),
            wanted=f"at most {INSTRUCTION_CHARACTERS} characters",
            remedy="Say in a few sentences what the expert does.",
        )
    return text


def _text(value: Any, *where: str, file: str = files.CARD) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise _invalid((file, *where), met=type(value).__name__, wanted="a text", remedy="Write it as a text.")
    if len(value) > DESCRIPTION_CHARACTERS:
        raise _invalid(
            (file, *where),
            met=f"{len(value)} characters",
            wanted=f"at most {DESCRIPTION_CHARACTERS} characters",
            remedy="Shorten it.",
        )
    return value.strip()


def _texts(value: Any, count: int, characters: int, *where: str, file: str = files.CARD) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    items = value if isinstance(value, list) else [value]
    if len(items) > count:
        raise _invalid(
            (file, *where), met=f"{len(items)} entries", wanted=f"at most {count}", remedy="Keep the most telling ones."
        )
    result = []
    for position, item in enumerate(items):
        text = str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item
        text = _text(text, *where, str(position), file=file)
        if len(text) > characters:
            raise _invalid(
                (file, *where, str(position)),
                met=f"{len(text)} characters",
                wanted=f"at most {characters} characters",
                remedy="Shorten it.",
            )
        if text:
            result.append(text)
    return tuple(result)


def _invalid(where: tuple[str, ...], *, met: object, wanted: object, remedy: str) -> UploadInvalid:
    pointer = files.pointer_of(*(where or (files.CARD,)))
    return UploadInvalid(
        f"The card breaks a rule at {pointer}: met {met}, wanted {wanted}.",
        faults=[Fault(pointer, met, wanted, remedy, "U1")],
    )
