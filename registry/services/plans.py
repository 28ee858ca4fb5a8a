"""What a commit would make, checked as a whole before anything is written; cheap checks first."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Sum

from moerge.tensors.adapters import AdapterConfig
from moerge.tensors.header import Limits
from registry import storage
from registry.checks import adapters, cards, files, gates, licences, statistics
from registry.checks.adapters import Examined
from registry.checks.cards import Card
from registry.errors import BaseUnknown, Fault, FileNotFound, QuotaExceeded, TooLarge, UploadInvalid
from registry.models import BaseModel, Blob, File, Namespace, Revision
from registry.services import bases, blobs
from registry.services.blobs import Staged
from registry.services.limits import header_limits


@dataclass(frozen=True)
class Changes:
    """What a commit does to the tree of its parent: files by path, staged or kept already, and what goes."""

    added: Mapping[str, Staged | Blob] = field(default_factory=dict)
    deleted: tuple[str, ...] = ()
    deleted_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One file of a tree that is about to be."""

    path: str
    sha256: str
    size_bytes: int
    source: Staged | Blob
    is_new: bool


@dataclass(frozen=True)
class Plan:
    """A tree that has passed every check, and what its revision will say."""

    parent: Revision | None
    tree: dict[str, Entry]
    card: Card
    overrides: dict[str, Any]
    base: BaseModel | None
    examined: Examined | None
    warnings: tuple[str, ...]
    manifest_digest: str
    statistics: Mapping[str, Any] | None = None  # kinds and sha256 of stats.safetensors, where it is and fits
    gates: Mapping[str, Any] | None = None  # method, count and sha256 of routing_gates.safetensors, likewise

    def sources(self) -> list[Staged | Blob]:
        """Where the bytes of the tree are."""
        return [entry.source for entry in self.tree.values()]

    @property
    def is_complete(self) -> bool:
        return self.examined is not None

    def commit(self, expert_id: int) -> str:
        """The 40 hexadecimal digits that name the revision: the same change of the same parent has the same name."""
        base = self.base.name if self.base else ""
        parts = [expert_id, self.parent.commit if self.parent else "", self.manifest_digest, base, self.overrides]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha1(canonical.encode(), usedforsecurity=False).hexdigest()


def plan(
    parent: Revision | None, changes: Changes, given: Mapping[str, Any], *, namespace: Namespace, opened: ExitStack
) -> Plan:
    """Everything that can be said against a change, said before anything is written; cheap checks first."""
    tree = tree_of(parent, changes)
    _check_sizes(tree, namespace)
    limits = header_limits()
    paths: dict[str, Path] = {}

    def path_of(entry: Entry) -> Path:
        if entry.path not in paths:
            paths[entry.path] = _open(entry.source, opened)
        return paths[entry.path]

    new = [entry for entry in tree.values() if entry.is_new]
    for entry in new:
        rule = files.rule_for(entry.path, pointer=files.pointer_of(entry.path), limit_bytes=settings.HUB_FILE_MAX_BYTES)
        files.check_content(entry.path, path_of(entry), rule, limits=limits)
    overrides = _inherited(parent, given)
    card_entry, config_entry, weights_entry = (tree.get(path) for path in (files.CARD, files.CONFIG, files.WEIGHTS))
    card = cards.parse(files.read_text(files.CARD, path_of(card_entry))) if card_entry else Card()
    card = cards.merged(card, overrides)
    config = adapters.read_config(path_of(config_entry)) if config_entry else None
    examined = None
    base, warnings = _base(config, card, given) if config else (None, [])
    if config and weights_entry:
        examined = adapters.examine(config, path_of(weights_entry), limits=limits)
        if base is None:
            raise _question(config, card)
        _check_base(base, examined)
        warnings += examined.facts.warnings
    gated, said = _gates(tree, examined, base, path_of, limits=limits)
    warnings += said
    for entry in new:
        if files.is_weights(entry.path):
            warnings += adapters.scan(entry.path, path_of(entry), limits=limits)
    beside, said = _statistics(tree, examined, path_of, limits=limits)
    warnings += said
    if examined and base:
        warnings += [*_lacking(card), *licences.of_upload(card.licence, (base.name, base.licence))]
    unique = tuple(dict.fromkeys(warnings))
    return Plan(parent, tree, card, overrides, base, examined, unique, manifest(tree), beside, gated)


def tree_of(parent: Revision | None, changes: Changes) -> dict[str, Entry]:
    """The parent's files with the change applied, by path."""
    tree: dict[str, Entry] = {}
    if parent is not None:
        for file in File.objects.filter(revision=parent).select_related("blob"):
            tree[file.path] = Entry(file.path, file.blob_id, file.blob.size_bytes, file.blob, is_new=False)
    for path in changes.deleted:
        if tree.pop(path, None) is None:
            raise FileNotFound(f"There is no file {path[:200]!r} to delete.")
    for folder in changes.deleted_folders:
        start = folder.rstrip("/") + "/"
        gone = [path for path in tree if path.startswith(start)]
        if not gone:
            raise FileNotFound(f"There is no folder {folder[:200]!r} to delete.")
        for path in gone:
            del tree[path]
    for path, source in changes.added.items():
        before = tree.get(path)
        is_new = before is None or before.sha256 != source.sha256
        tree[path] = Entry(path, source.sha256, source.size_bytes, source, is_new=is_new)
    return dict(sorted(tree.items()))


def _check_sizes(tree: Mapping[str, Entry], namespace: Namespace) -> None:
    if len(tree) > settings.HUB_UPLOAD_MAX_FILES:
        raise TooLarge(
            f"{len(tree)} files are too many.",
            faults=[Fault("/files", len(tree), f"at most {settings.HUB_UPLOAD_MAX_FILES}", "Leave files out.", "U4")],
        )
    seen: dict[str, str] = {}
    for path in tree:
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            fault = Fault(
                files.pointer_of(path),
                path,
                f"a name that differs from {other} by more than case",
                "Rename one of the two.",
                "U3",
            )
            raise UploadInvalid(f"{path} and {other} are one file on some systems.", faults=[fault])
        if any(path.startswith(f"{folder}/") for folder in tree if len(folder) < len(path)):
            fault = Fault(
                files.pointer_of(path), path, "a folder that is not also a file", "Rename one of the two.", "U3"
            )
            raise UploadInvalid(f"A part of {path} is a file.", faults=[fault])
    total = sum(entry.size_bytes for entry in tree.values())
    if total > settings.HUB_UPLOAD_MAX_BYTES:
        raise TooLarge(
            f"The files have {total} bytes together.",
            faults=[Fault("/files", total, f"at most {settings.HUB_UPLOAD_MAX_BYTES} bytes", "Leave files out.", "U4")],
        )
    check_quota(namespace, sum(entry.size_bytes for entry in tree.values() if entry.is_new))


def check_quota(namespace: Namespace, more_bytes: int) -> None:
    """Raises QuotaExceeded when a namespace would hold more than it may; bytes that it holds twice count once."""
    held = (
        (
            Blob.objects.filter(
                # What readers had reconstructed is not the owner's to answer for.
                pk__in=File.objects.filter(revision__expert__namespace=namespace, revision__derived_from=None).values(
                    "blob"
                )
            ).aggregate(size=Sum("size_bytes"))["size"]
        )
        or 0
    )
    limit = settings.HUB_NAMESPACE_MAX_BYTES
    if held + more_bytes > limit:
        raise QuotaExceeded(
            f"{namespace.name} holds {held} bytes and may hold {limit}.",
            faults=[
                Fault(
                    "/files",
                    held + more_bytes,
                    f"at most {limit} bytes",
                    "Delete experts, or ask an administrator.",
                    "L3",
                )
            ],
        )


def _open(source: Staged | Blob, opened: ExitStack) -> Path:
    if isinstance(source, Staged):
        return source.path
    return opened.enter_context(storage.current().as_path(source.sha256))


def _inherited(parent: Revision | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Card fields given beside files hold until others are given."""
    before = parent.facts.get("overrides", {}) if parent else {}
    return {**before, **given}


def _base(config: AdapterConfig, card: Card, given: Mapping[str, Any]) -> tuple[BaseModel | None, list[str]]:
    """The base of the tree and warnings: what the config names; where that leads nowhere, what the card answers.

    An answer that is given beside the files and leads elsewhere than the config is refused; a card that does is warned
    about. None when nobody names a base that is known.
    """
    stated = bases.find(config.base_model_name_or_path)
    answer = given.get("base_model")
    if answer:
        other = bases.resolve(answer, pointer="/card/base_model")
        if stated is not None and other.pk != stated.pk:
            remedy = f"Leave it out, or correct {bases.POINTER[1:]}."
            raise UploadInvalid(
                f"The config names {stated.name} as base, the upload {other.name}.",
                faults=[Fault("/card/base_model", answer, stated.name, remedy)],
            )
        return other, []
    named = bases.find(card.base_model)
    if stated is None or named is None or named.pk == stated.pk:
        return stated or named, []
    return stated, [f"The card names {named.name} as base, the config {stated.name}; the config holds."]


def _question(config: AdapterConfig, card: Card) -> BaseUnknown:
    """The base is asked for: neither config nor card names one that is known."""
    stated = config.base_model_name_or_path
    if card.base_model and card.base_model != stated and not bases.is_path(card.base_model):
        what = f"The base model is not known here; README.md names {card.base_model!r}, which is not known either"
    elif not stated:
        what = "The adapter does not say which base model it was trained on"
    elif bases.is_path(stated):
        what = "The base model is given as a path on somebody's machine"
    else:
        what = "The base model is not known here"
    return bases.unknown(stated, pointer=bases.POINTER, what=what)


def _check_base(base: BaseModel, examined: Examined) -> None:
    found = bases.mismatch(base, examined.facts.shapes)
    if found is None:
        return
    module, met, wanted = found
    remedy = "Name the base that the adapter was trained on; if it is this one, train on its unchanged layers."
    raise UploadInvalid(
        f"{module} has a delta of {met[0]} x {met[1]}; {base.name} has {wanted[0]} x {wanted[1]} there.",
        faults=[Fault(files.pointer_of(files.WEIGHTS, module), list(met), list(wanted), remedy, "T4")],
    )


def _statistics(
    tree: Mapping[str, Entry], examined: Examined | None, path_of: Callable[[Entry], Path], *, limits: Limits
) -> tuple[dict[str, Any] | None, list[str]]:
    """Kinds and digest of the statistics beside the adapter, if there are any, and warnings."""
    entry = tree.get(statistics.FILE)
    if entry is None:
        return None, []
    kinds = statistics.examine(path_of(entry), examined.facts if examined else None, limits=limits)
    if entry.is_new:
        statistics.scan(path_of(entry))
    if examined is None:
        return None, []
    is_old = not entry.is_new and tree[files.WEIGHTS].is_new
    warnings = [f"{statistics.FILE} was gathered on other weights than these."] if is_old else []
    return {"kinds": list(kinds), "sha256": entry.sha256}, warnings


def _gates(
    tree: Mapping[str, Entry],
    examined: Examined | None,
    base: BaseModel | None,
    path_of: Callable[[Entry], Path],
    *,
    limits: Limits,
) -> tuple[dict[str, Any] | None, list[str]]:
    """What is to be known of the gates beside the adapter, if there are any, and warnings."""
    entry = tree.get(gates.FILE)
    if entry is None:
        return None, []
    about, count = gates.examine(path_of(entry), examined.facts if examined else None, limits=limits)
    if entry.is_new:
        gates.scan(path_of(entry))
    if examined is None or base is None:
        return None, []
    named = bases.find(about.base_model.partition("@")[0])
    if named is not None and named.pk != base.pk:
        fault = Fault(files.pointer_of(gates.FILE, "__metadata__", "base_model"), named.name, base.name,
                      "Train the gates on this adapter, or leave the file out.")  # fmt: skip
        raise UploadInvalid(
            f"{gates.FILE} was trained on {named.name}, the adapter belongs to {base.name}.", faults=[fault]
        )
    warnings = []
    if not entry.is_new and tree[files.WEIGHTS].is_new:
        warnings.append(f"{gates.FILE} was trained on other weights than these.")
    if missing := len(examined.facts.shapes) - count:
        warnings.append(
            f"{missing} of {len(examined.facts.shapes)} modules have no gate; no token goes there by gates."
        )
    return {"method": about.method, "count": count, "sha256": entry.sha256}, warnings


def _lacking(card: Card) -> list[str]:
    """What a card should have so that the expert is found by what it is good at."""
    warnings = []
    if not card.description:
        warnings.append("The card has no description: write `moerge: task:` into the front matter of README.md.")
    if len(card.examples) < 5:
        warnings.append(f"The card has {len(card.examples)} example inputs; five or more make routing much better.")
    return warnings


def manifest(tree: Mapping[str, Entry]) -> str:
    return blobs.manifest((entry.path, entry.sha256, entry.size_bytes) for entry in tree.values())
