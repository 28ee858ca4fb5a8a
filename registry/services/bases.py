"""Base models: every name a checkpoint goes by leads to one row, because experts can meet only on the same base."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from django.db import IntegrityError, transaction

from registry.checks import names
from registry.errors import BaseUnknown, Fault, NameInvalid, NameTaken
from registry.models import BaseAlias, BaseModel, User
from registry.services import audit

POINTER = "/adapter_config.json/base_model_name_or_path"
DATA = Path(__file__).resolve().parent.parent / "data" / "base_models.json"
PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
CACHE = re.compile(r"models--([A-Za-z0-9_.-]+?)--([A-Za-z0-9_.-]+?)(?:/|$)")
# How quantised copies are called: llama-3-8b-bnb-4bit, Mistral-7B-v0.1-GPTQ, Qwen2.5-7B-Instruct-AWQ.
QUANTISED = re.compile(
    r"[-_.](?:unsloth|bnb|dynamic|nf4|fp4|fp8|int4|int8|[348]-?bits?|w4a16|w8a8|w8a16|gptq|awq|gguf|ggml|hqq|eetq|aqlm|exl2|g\d+|mlx"
    r"|bf16|fp16|marlin|autoround|quantized(?:\.w\da\d+)?|torchao)$",
    re.IGNORECASE,
)
# Owners that repackage other people's checkpoints under the same short name.
REPACKAGERS = frozenset(
    """unsloth thebloke hugging-quants neuralmagic redhatai casperhansen maziyarpanahi bartowski solidrust mlx-community
    ista-daslab lmstudio-community quantfactory turboderp modelcloud""".split()
)


@dataclass(frozen=True)
class Known:
    """One entry of the list of well-known bases that comes with the hub."""

    name: str
    licence: str
    architecture: str
    parameter_count: int | None
    aliases: tuple[str, ...]
    quantised: tuple[str, ...]
    shapes: dict[str, list[int]]


def resolve(name: str | None, *, pointer: str = POINTER) -> BaseModel:
    """The base that a config or a caller names by any of its names; a quantised copy leads to what it was made from.

    Raises BaseUnknown, which says what to do, for nothing, a path, and a name that nobody registered.
    """
    if not name or not name.strip():
        raise unknown(name, pointer=pointer, what="The adapter does not say which base model it was trained on")
    cleaned = PAGE.sub("", name.strip()).rstrip("/")
    if is_path(cleaned):
        raise unknown(name, pointer=pointer, what="The base model is given as a path on somebody's machine")
    found = None if "\0" in cleaned else _find(cleaned)
    if found is None:
        raise unknown(name, pointer=pointer, what="The base model is not known here")
    return found.quantised_from or found


def find(name: str | None) -> BaseModel | None:
    """As `resolve`, with None for what is not known."""
    try:
        return resolve(name)
    except BaseUnknown:
        return None


def is_path(name: str) -> bool:
    """Whether a base's name is a place on a disk rather than a name of a checkpoint."""
    return (
        name.startswith(("/", "./", "../", "~", "file:"))
        or name in {".", ".."}
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or name.count("/") > 1
    )


def unknown(name: str | None, *, pointer: str, what: str) -> BaseUnknown:
    """The refusal that asks for the base, with every way to answer."""
    remedy = (
        "Name the base as owner/name: set base_model_name_or_path in adapter_config.json, or base_model in the front "
        "matter of README.md, or card.base_model of the upload. A base that is new here is registered by "
        'POST /api/v1/bases {"name": "owner/name"}.'
    )
    cached = CACHE.search(name or "")
    if cached:
        remedy = f"The path looks like {cached[1]}/{cached[2]}. {remedy}"
    met = name[:200] if name else None
    fault = Fault(pointer, met, "the name of a base model that the hub knows, as owner/name", remedy)
    return BaseUnknown(f"{what}: {met!r}." if met else f"{what}.", faults=[fault])


def register(
    *,
    user: User,
    name: str,
    licence: str = "",
    architecture: str = "",
    parameter_count: int | None = None,
) -> BaseModel:
    """Make a base known; one of exactly this name is returned as it is.

    Raises NameInvalid, and NameTaken when the name already leads to another base.
    """
    owner, slash, short = name.partition("/")
    for part in (owner, short) if slash else (owner,):
        names.check_part(part, pointer="/name")
    if is_path(name):
        raise NameInvalid(f"{name[:200]!r} is a path.", faults=[Fault("/name", name[:200], "owner/name")])
    found = _find(name)
    if found is not None:
        if found.name.casefold() == name.casefold():
            return found
        remedy = f"Use {(found.quantised_from or found).name}; experts on both names meet there."
        raise NameTaken(
            f"{name!r} is another name of {found.name}.",
            faults=[Fault("/name", name, "a name that is not known", remedy)],
        )
    try:
        with transaction.atomic():
            base = BaseModel.objects.create(
                name=name, licence=licence.lower(), architecture=architecture, parameter_count=parameter_count
            )
            BaseAlias.objects.create(key=name.casefold(), base=base)
            audit.record(user, "base.register", name)
    except IntegrityError:  # somebody registered it in the same moment
        return resolve(name, pointer="/name")
    return base


def known() -> Iterator[Known]:
    """The well-known bases."""
    for row in json.loads(DATA.read_text(encoding="utf-8")):
        yield Known(**{**row, "aliases": tuple(row["aliases"]), "quantised": tuple(row["quantised"])})


def sync() -> int:
    """Write the well-known bases and their aliases into rows; can be run at any time, and again. Returns how many.

    Shapes of the list win over what experts taught; an alias that leads elsewhere already stays as it is.
    """
    entries = list(known())
    with transaction.atomic():
        learned = dict(BaseModel.objects.values_list("name", "shapes"))
        rows = [
            BaseModel(
                name=entry.name,
                licence=entry.licence,
                architecture=entry.architecture,
                parameter_count=entry.parameter_count,
                shapes=entry.shapes or learned.get(entry.name, {}),
            )
            for entry in entries
        ]
        BaseModel.objects.bulk_create(
            rows,
            update_conflicts=True,
            unique_fields=["name"],
            update_fields=["licence", "architecture", "parameter_count", "shapes"],
        )
        ids = dict(BaseModel.objects.values_list("name", "pk"))
        names = [(name, entry.name, False) for entry in entries for name in (entry.name, *entry.aliases)]
        names += [(name, entry.name, True) for entry in entries for name in entry.quantised]
        BaseAlias.objects.bulk_create(
            [
                BaseAlias(key=name.casefold(), base_id=ids[base], is_quantised=is_quantised)
                for name, base, is_quantised in names
            ],
            ignore_conflicts=True,
        )
    return len(entries)


def _find(name: str) -> BaseModel | None:
    """By alias; then without the endings of quantised copies; then, for known repackagers, by the short name alone."""
    candidates = list(_candidates(name.casefold()))
    rows = BaseAlias.objects.filter(key__in=candidates).select_related("base__quantised_from")
    by_key: Mapping[str, BaseModel] = {row.key: row.base for row in rows}
    found = next((by_key[key] for key in candidates if key in by_key), None)
    if found is not None:
        return found
    owner, _, _ = name.casefold().partition("/")
    if owner not in REPACKAGERS:
        return None
    for key in candidates:
        short = key.rpartition("/")[2]
        matches = {row.base for row in BaseAlias.objects.filter(key__endswith=f"/{short}").select_related("base")}
        if len(matches) == 1:
            return matches.pop()
    return None


def _candidates(key: str) -> Iterator[str]:
    yield key
    while (shorter := QUANTISED.sub("", key)) != key:
        key = shorter
        yield key


def pattern_of(module: str) -> str:
    """A module's name with its layer numbers as stars: encoder.layer.*.attention.self.query."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def mismatch(
    base: BaseModel, shapes: Mapping[str, tuple[int, int]]
) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    """The first module whose delta does not fit the base: module, shape met, shape wanted.

    What wraps a base (a task head, a sentence encoder) puts words before its module names, so known names are compared
    with the end of the module's.
    """
    wanted = {pattern: (int(shape[0]), int(shape[1])) for pattern, shape in base.shapes.items()}
    for module, met in shapes.items():
        pattern = pattern_of(module)
        while pattern and pattern not in wanted:
            pattern = pattern.partition(".")[2]
        if pattern and tuple(met) != wanted[pattern]:
            return module, met, wanted[pattern]
    return None


def learn(base: BaseModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Remember the shapes of a base whose modules are not listed, from its first expert on; inside a transaction."""
    if any(known_base.name == base.name and known_base.shapes for known_base in known()):
        return
    row = BaseModel.objects.select_for_update().get(pk=base.pk)
    found = {pattern_of(module): list(shape) for module, shape in shapes.items()}
    if new := found.keys() - row.shapes.keys():
        row.shapes |= {pattern: found[pattern] for pattern in sorted(new)[: 4096 - len(row.shapes)]}
        row.save(update_fields=["shapes"])
