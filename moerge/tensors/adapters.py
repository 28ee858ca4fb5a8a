"""Adapters: config and tensors checked against each other, and deltas per module in one orientation.

The words of PEFT (`lora_alpha`, `target_modules`, key prefixes) stop here and in `kinds/`: the rest of the library
sees modules, LowRank factors and scalings.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

from moerge import table
from moerge.errors import AdapterInvalid
from moerge.tensors import config as configs
from moerge.tensors import files, kinds, places, saving, scan
from moerge.tensors.bases import BaseWeights
from moerge.tensors.config import AdapterConfig
from moerge.tensors.files import Float32
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    SAVE_AGAIN,
    AdapterFacts,
    Blocker,
    Dense,
    Gain,
    Kind,
    Layout,
    LowRank,
    Roles,
    Site,
    Tensors,
    check_fit,
    invalid,
)
from moerge.tensors.targets import Targets, of_base

__all__ = ["Adapter", "AdapterConfig", "AdapterFacts", "BaseWeights", "Blocker", "Dense", "Gain", "Layout", "LowRank",
           "catalogue", "check", "content_digest", "load", "parse_config", "save_ia3", "save_lora",
           "scan_finite"]  # fmt: skip

Read = TypeVar("Read")
parse_config = configs.parse
save_lora = saving.save_lora
save_ia3 = saving.save_ia3


@cache
def catalogue() -> Mapping[str, Kind]:
    """Every kind of adapter, by the peft_type of its config."""
    return {module.SPEC.peft_type: module.SPEC for module in table.load(kinds).values()}


def check(
    config: AdapterConfig, header: Header, *, base_shapes: Mapping[str, tuple[int, int]] | None = None
) -> AdapterFacts:
    """What config and header say together; no tensor byte is read.

    Every tensor must have a place: a role in a module the config targets, a module to save, a bias or an embedding.
    `base_shapes` are (d_out, d_in) of the base's modules, where known. Raises AdapterInvalid where config and tensors
    disagree, ConfigInvalid where a pattern of the config cannot be used.
    """
    kind = _kind(config)
    targets = Targets(config)
    found = places.sort(kind, config, targets, header)
    _check_targets(config, targets, found.roles)
    facts = kind.check(config, found.roles, targets, header) if kind.check else {}
    if not found.roles and not found.loose:
        raise invalid("The file holds no tensor of this kind of adapter", pointer="/peft_type", met=config.peft_type,
                      wanted=f"tensors of {config.peft_type}", remedy=SAVE_AGAIN)  # fmt: skip
    for module, fact in facts.items():
        check_fit(module, fact.shape, (base_shapes or {}).get(module, fact.shape))
    blockers = (*kind.blockers(config, header), *found.blockers)
    return AdapterFacts(
        kind=kind.name,
        modules=tuple(sorted(found.roles)),
        ranks={module: fact.rank for module, fact in sorted(facts.items())},
        rank=max((fact.rank for fact in facts.values()), default=0),
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in found.roles})),
        n_parameters=sum(info.size for info in header.tensors.values()),
        shapes={module: fact.shape for module, fact in sorted(facts.items())},
        scalings={module: fact.scaling for module, fact in sorted(facts.items())},
        layouts={module: fact.layout for module, fact in sorted(facts.items())},
        saved=tuple(sorted(found.saved)),
        biases=tuple(sorted(found.biases)),
        biased=tuple(sorted(module for module, tensors in found.roles.items() if "bias" in tensors)),
        gains={module: tensors["gain"].size for module, tensors in sorted(found.roles.items()) if "gain" in tensors},
        feedforward=kind.feedforward(found.roles, targets) if kind.feedforward else frozenset(),
        blockers=blockers,
        warnings=tuple(found.warnings),
    )


class Lazy(Mapping[str, Read]):
    """Name -> what `read` makes of it at each look-up, so memory holds one module at a time; in sorted order."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Read]) -> None:
        self._names, self._read = dict.fromkeys(sorted(names)), read

    def __getitem__(self, name: str) -> Read:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk whose whole effect is known. All its mappings read lazily and are sorted by name.

    `modules` are deltas of weights by module, `biases` deltas of the modules' output biases, `gains` what IA3
    multiplies, `saved` the tensors that replace tensors of the base, by the base's names.
    """

    config: AdapterConfig
    facts: AdapterFacts
    path: Path
    modules: Mapping[str, LowRank | Dense]
    biases: Mapping[str, Float32]
    gains: Mapping[str, Gain]
    saved: Mapping[str, Float32]

    @property
    def family(self) -> str:
        return self.facts.family

    @cached_property
    def digest(self) -> str:
        """What the adapter is, apart from its name: equal digests mean equal deltas."""
        return content_digest(files.sha256(self.path), self.config.sha256)


def content_digest(weights_sha256: str, config_sha256: str) -> str:
    """SHA-256 over the digests of the two files, so that a hub knows it from its rows and a folder has the same."""
    return hashlib.sha256(f"{weights_sha256}\n{config_sha256}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Opens the file for each look-up and hands one module or tensor to whoever asked."""

    config: AdapterConfig
    facts: AdapterFacts
    path: Path
    header: Header
    roles: Roles
    base: BaseWeights | None

    def module(self, form: Callable[[Site], Read]) -> Callable[[str], Read]:
        """Reader of what `form` makes of a module."""

        def read(module: str) -> Read:
            with files.open_file(self.path, known=self.header) as file:
                return form(Site(file=file, config=self.config, module=module, tensors=self.roles[module],
                                 whole=self.facts, base=self.base))  # fmt: skip

        return read

    def tensor(self, name: str) -> Float32:
        with files.open_file(self.path, known=self.header) as file:
            return file.float32(name)


def load(
    config: AdapterConfig, path: str | Path, *, accept: Collection[str] = (), base: BaseWeights | None = None
) -> Adapter:
    """Open an adapter for merging.

    Raises AdapterInvalid when its deltas cannot be formed, saying why. `accept` holds pointers of blockers that the
    caller deals with itself, such as "/modules_to_save" when it keeps one expert's `saved` tensors. `base`, which must
    stay open as long as the adapter is read, removes the blockers that say so.
    """
    path = Path(path)
    with files.open_file(path) as file:
        header = file.header
    facts = check(config, header)
    kind = _kind(config)
    for blocker in facts.blockers:
        if (blocker.needs_base and base is not None) or (blocker.pointer in accept and kind.delta is not None):
            continue
        raise AdapterInvalid(f"{blocker.reason}: met {blocker.met}.", pointer=blocker.pointer, met=blocker.met,
                             wanted="an adapter whose whole effect is known from its files", remedy=blocker.remedy,
                             rule="T4")  # fmt: skip
    roles = places.sort(kind, config, Targets(config), header).roles
    if base is not None:
        facts = _with_base(kind, config, facts, base)
    reader = _Reader(config=config, facts=facts, path=path, header=header, roles=roles, base=base)
    assert kind.delta is not None
    biases: Mapping[str, Float32] = Lazy(facts.biased, reader.module(kind.bias)) if kind.bias else {}
    gains: Mapping[str, Gain] = Lazy(facts.gains, reader.module(kind.gain)) if kind.gain else {}
    replaced = {places.of_base_tensor(name): name for name in (*facts.saved, *facts.biases)}
    return Adapter(
        config=config, facts=facts, path=path, modules=Lazy(facts.shapes, reader.module(kind.delta)), biases=biases,
        gains=gains, saved=Lazy(replaced, lambda name: reader.tensor(replaced[name])),
    )  # fmt: skip


def _with_base(kind: Kind, config: AdapterConfig, facts: AdapterFacts, base: BaseWeights) -> AdapterFacts:
    """The facts where those of the file depend on the base: shapes, ranks, and the biases that IA3 multiplies."""
    if kind.with_base is None:
        return facts
    shapes = {name: shape for name in facts.modules if (shape := base.shape(f"{of_base(name)}.weight")) is not None}
    found = kind.with_base(config, facts, shapes)
    biased = {name for name in facts.gains if name not in facts.feedforward and base.find(f"{name}.bias")}
    return replace(
        facts, ranks={name: fact.rank for name, fact in found.items()},
        rank=max((fact.rank for fact in found.values()), default=0),
        shapes={name: fact.shape for name, fact in found.items()},
        scalings={name: fact.scaling for name, fact in found.items()},
        layouts={name: fact.layout for name, fact in found.items()}, biased=tuple(sorted({*facts.biased, *biased})),
    )  # fmt: skip


def scan_finite(path: str | Path, header: Header) -> tuple[str, ...]:
    """Look at every value for NaN and infinity; returns warnings. Raises AdapterInvalid naming the tensor."""
    return scan.scan_finite(path, header, tuple(e for kind in catalogue().values() for e in kind.zero_endings))


def _kind(config: AdapterConfig) -> Kind:
    kind = catalogue().get(config.peft_type)
    if kind is None:
        raise invalid("This kind of adapter is not known", pointer="/peft_type", met=config.peft_type[:100],
                      wanted=f"one of {', '.join(sorted(catalogue()))}",
                      remedy="Upload an adapter that PEFT itself can load; spelling and capitals count.")  # fmt: skip
    return kind


def _check_targets(config: AdapterConfig, targets: Targets, roles: Mapping[str, Tensors]) -> None:
    if config.raw.get("target_parameters"):
        return
    for module, tensors in roles.items():
        if not targets.is_target(module):
            raise invalid("The weights have a module that the config does not target", pointer=next(
                iter(tensors.values())).name, met=module, remedy=SAVE_AGAIN,
                wanted=f"a module of target_modules {_shown(config.target_modules)}")  # fmt: skip


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return str(list(targets) if isinstance(targets, tuple) else targets)[:200]
