"""Adapters: config and tensors checked against each other, and deltas per module in one orientation.

The words of PEFT (`lora_alpha`, `target_modules`, key prefixes) stop here and in `kinds/`: the rest of the library
sees modules, LowRank factors and scalings.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from moerge import table
from moerge.errors import AdapterInvalid
from moerge.tensors import config as configs
from moerge.tensors import files, kinds, places, saving, scan
from moerge.tensors.config import AdapterConfig
from moerge.tensors.header import Header
from moerge.tensors.kind import (
    AdapterFacts,
    Blocker,
    Kind,
    Layout,
    LowRank,
    ModuleFacts,
    Roles,
    Tensors,
    invalid,
)
from moerge.tensors.targets import Targets

__all__ = ["Adapter", "AdapterConfig", "AdapterFacts", "Blocker", "Layout", "LowRank", "catalogue", "check", "content_digest", "load",
           "parse_config", "save_lora", "scan_finite"]  # fmt: skip

parse_config = configs.parse
save_lora = saving.save_lora
_SAVE_AGAIN = "Save config and weights together with PeftModel.save_pretrained and upload both."


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
    facts = kind.check(config, found.roles, targets) if kind.check else {}
    if not found.roles and not found.loose:
        raise invalid("The file holds no tensor of this kind of adapter", pointer="/peft_type", met=config.peft_type,
                      wanted=f"tensors of {config.peft_type}", remedy=_SAVE_AGAIN)  # fmt: skip
    _check_shapes(facts, base_shapes or {})
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
        blockers=blockers,
        warnings=tuple(found.warnings),
    )


class Modules(Mapping[str, LowRank]):
    """Module name -> LowRank; each look-up reads that module's tensors, so memory holds one module at a time."""

    def __init__(self, kind: Kind, roles: Roles, facts: Mapping[str, ModuleFacts], path: Path, header: Header) -> None:
        self._kind, self._roles, self._path, self._header = kind, roles, path, header
        self._facts = dict(sorted(facts.items()))

    def __getitem__(self, module: str) -> LowRank:
        facts = self._facts[module]
        assert self._kind.low_rank is not None
        with files.open_file(self._path, known=self._header) as file:
            return self._kind.low_rank(file, self._roles[module], facts)

    def __contains__(self, module: object) -> bool:
        return module in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk whose deltas can be formed; `modules` reads lazily, sorted by name."""

    config: AdapterConfig
    facts: AdapterFacts
    path: Path
    modules: Modules

    @cached_property
    def digest(self) -> str:
        """What the adapter is, apart from its name: equal digests mean equal deltas."""
        return content_digest(files.sha256(self.path), self.config.sha256)


def content_digest(weights_sha256: str, config_sha256: str) -> str:
    """SHA-256 over the digests of the two files, so that a hub knows it from its rows and a folder has the same."""
    return hashlib.sha256(f"{weights_sha256}\n{config_sha256}".encode()).hexdigest()


def load(config: AdapterConfig, path: str | Path, *, accept: Collection[str] = ()) -> Adapter:
    """Open an adapter for merging.

    Raises AdapterInvalid when its deltas cannot be formed, saying why. `accept` holds pointers of blockers that the
    caller deals with itself, such as "/modules_to_save" when it keeps one expert's `facts.saved` tensors.
    """
    path = Path(path)
    with files.open_file(path) as file:
        header = file.header
    facts = check(config, header)
    kind = _kind(config)
    for blocker in facts.blockers:
        if blocker.pointer not in accept or kind.low_rank is None:
            raise AdapterInvalid(f"{blocker.reason}: met {blocker.met}.", pointer=blocker.pointer, met=blocker.met,
                                 wanted="an adapter whose whole effect is a low-rank delta", remedy=blocker.remedy,
                                 rule="T4")  # fmt: skip
    roles = places.sort(kind, config, Targets(config), header).roles
    of_modules = {
        module: ModuleFacts(rank=rank, shape=facts.shapes[module], scaling=facts.scalings[module],
                            layout=facts.layouts[module])
        for module, rank in facts.ranks.items()
    }  # fmt: skip
    return Adapter(config, facts, path, Modules(kind, roles, of_modules, path, header))


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
                iter(tensors.values())).name, met=module, remedy=_SAVE_AGAIN,
                wanted=f"a module of target_modules {_shown(config.target_modules)}")  # fmt: skip


def _check_shapes(facts: Mapping[str, ModuleFacts], base_shapes: Mapping[str, tuple[int, int]]) -> None:
    for module, fact in facts.items():
        wanted = base_shapes.get(module, fact.shape)
        if fact.shape != wanted:
            raise invalid("A module does not fit the base model", pointer=module, met=list(fact.shape),
                          wanted=f"{list(wanted)} (out, in)",
                          remedy="Name the base model this adapter was trained on.")  # fmt: skip


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return str(list(targets) if isinstance(targets, tuple) else targets)[:200]
