"""Arrow prototypes: per module the direction that an adapter's delta answers to most (arXiv 2405.11157).

The prototype of a module is the leading right singular vector of its delta. A token u goes to the experts of largest
|u . p|. Everything comes from the adapter's own file; nothing is trained.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moerge.errors import AdapterInvalid
from moerge.routing import containers, spectra
from moerge.tensors import adapters, files
from moerge.tensors.adapters import Adapter, AdapterConfig
from moerge.tensors.files import Float32
from moerge.tensors.kind import Dense, LowRank

# A delta is known without these too: other tensors of the base that the adapter replaces, and DoRA's magnitudes.
_ACCEPTED = ("/bias", "/modules_to_save", "/use_dora")
_LARGEST = float(np.finfo(np.float32).max)
FORMAT = "moerge-prototypes/1"
VECTOR, SIGMA, SHARE = "arrow", "arrow_sigma", "arrow_share"


@dataclass(frozen=True, eq=False)
class Prototype:
    """Of one module: unit vector (d_in,) whose component of largest magnitude is positive; `sigma`, the largest
    singular value of the delta; `share`, how much of the delta's squared norm lies in that direction.
    """

    vector: Float32
    sigma: float
    share: float


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The prototypes of one adapter by module; `zero` names modules whose delta is zero, which have none.

    `is_approximate`: DoRA's magnitudes were left out. `reason` says why there is not a single one.
    """

    modules: Mapping[str, Prototype]
    zero: tuple[str, ...] = ()
    is_approximate: bool = False
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Deltas:
    """The deltas of an adapter as far as its own files tell, read one module at a time; else the `reason` why not."""

    adapter: Adapter | None
    is_approximate: bool = False
    reason: str = ""
    modules: Mapping[str, LowRank | Dense] = field(default_factory=dict)


def open_deltas(config: AdapterConfig, path: str | Path) -> Deltas:
    """The deltas that prototypes and fingerprints are made of. Raises HeaderInvalid, AdapterInvalid for bad files."""
    try:
        adapter = adapters.load(config, path, accept=_ACCEPTED)
    except AdapterInvalid as error:
        with files.open_file(path) as file:
            if adapters.check(config, file.header).blockers:
                return Deltas(None, reason=error.detail)
        raise
    if not adapter.modules:
        return Deltas(adapter, reason="The adapter adds no matrix to a layer: it multiplies values, or adds inputs.")
    return Deltas(adapter, is_approximate=config.use_dora, modules=adapter.modules)


def of_adapter(config: AdapterConfig, path: str | Path) -> Prototypes:
    """The prototypes of an adapter on disk; none, with the reason, for kinds without a matrix delta."""
    deltas = open_deltas(config, path)
    if deltas.reason:
        return Prototypes({}, reason=deltas.reason)
    found = of_deltas(deltas.modules)
    return Prototypes(found.modules, found.zero, deltas.is_approximate, found.reason)


def of_deltas(deltas: Mapping[str, LowRank | Dense]) -> Prototypes:
    """The prototypes of deltas by module.

    Siblings, such as query and key of one layer, that share one and the same A take one input to one code, and get one
    prototype: that of their stacked outputs.
    """
    modules: dict[str, Prototype] = {}
    zero: list[str] = []
    for names in _siblings(deltas):
        for tied, delta in _tied({name: deltas[name] for name in names}):
            spectrum = spectra.of_delta(delta)
            # What float32 holds: a delta below it does nothing, one beyond it no less than the largest.
            sigma = float(np.float32(min(spectrum.values[0], _LARGEST))) if spectrum else 0.0
            if spectrum is None or not sigma:
                zero += tied
                continue
            vector = spectrum.direction.astype(np.float32)
            modules |= dict.fromkeys(tied, Prototype(vector, sigma, spectrum.share))
    reason = "" if modules else "Every delta of the adapter is zero."
    return Prototypes(dict(sorted(modules.items())), tuple(sorted(zero)), reason=reason)


def _siblings(names: Iterable[str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    yield from groups.values()


def _tied(deltas: Mapping[str, LowRank | Dense]) -> Iterator[tuple[list[str], LowRank | Dense]]:
    """Modules that share an A, with their stacked delta; every other module alone."""
    left = dict(deltas)
    while left:
        name, delta = next(iter(left.items()))
        names = [name, *(other for other in left if other != name and _share(delta, left[other]))]
        same = [left.pop(name) for name in names]
        yield names, delta if len(names) == 1 else _stacked([one for one in same if isinstance(one, LowRank)])


def _share(one: LowRank | Dense, other: LowRank | Dense) -> bool:
    """Whether both take in what they get through the same A; a delta that is zero has no part in that."""
    if not isinstance(one, LowRank) or not isinstance(other, LowRank) or one.A.shape != other.A.shape:
        return False
    # Two rows differ as a rule in their first value, and the rest need not be read.
    is_same = np.array_equal(one.A[:, 0], other.A[:, 0]) and np.array_equal(one.A, other.A)
    return is_same and bool(one.B.any() and other.B.any())


def _stacked(deltas: Sequence[LowRank]) -> LowRank:
    rows = [np.float32(one.scaling) * one.B for one in deltas]
    return LowRank(deltas[0].A, np.concatenate(rows), 1.0)


def write(found: Prototypes, *, source: str) -> bytes:
    """Prototypes as one file, vectors in float16; `source` is the SHA-256 of the weights. Same input, same bytes."""
    tensors: dict[str, files.Tensor] = {}
    for module, one in found.modules.items():
        tensors[f"{VECTOR}/{module}"] = one.vector.astype(np.float16)
        tensors[f"{SIGMA}/{module}"] = np.array([one.sigma], np.float32)
        tensors[f"{SHARE}/{module}"] = np.array([one.share], np.float32)
    approximate = str(found.is_approximate).lower()
    return containers.dump(tensors, {"format": FORMAT, "source": source, "approximate": approximate})


def read(data: bytes) -> tuple[Prototypes, str]:
    """Prototypes and the SHA-256 of the weights; which modules are zero is not kept. Raises PackInvalid."""
    metadata, tensors = containers.load(data, FORMAT)
    modules = {}
    for name in sorted(name for name in tensors if name.startswith(f"{VECTOR}/")):
        module = name.removeprefix(f"{VECTOR}/")
        sigma, share = (tensors.get(f"{kind}/{module}") for kind in (SIGMA, SHARE))
        if sigma is None or share is None or sigma.shape != (1,) or share.shape != (1,):
            raise containers.invalid(
                "A prototype lacks its figures", pointer=name, met=module, wanted=f"{SIGMA} and {SHARE}"
            )
        modules[module] = Prototype(tensors[name].astype(np.float32), float(sigma[0]), float(share[0]))
    return Prototypes(modules, is_approximate=metadata.get("approximate") == "true"), metadata.get("source", "")
