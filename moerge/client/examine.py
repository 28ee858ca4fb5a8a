"""What can be known of an adapter, a tensor file or an encoded file without trusting whoever made it.

Each function reads, raises the library's own error at the first broken rule, and returns what it found, one line for
each thing that was checked.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge import compression
from moerge.compression.adapters import CONFIG_FILE, WEIGHTS_FILE
from moerge.compression.manifest import Budget
from moerge.compression.restore import config_beside
from moerge.errors import AdapterInvalid, HeaderInvalid
from moerge.tensors import adapters, checkpoints, files, header
from moerge.tensors.adapters import AdapterConfig
from moerge.tensors.header import Header, TensorInfo

# What stock writers put under `format`; an encoded file names its own.
_OF_FRAMEWORKS = frozenset({None, "pt", "np", "tf", "flax", "mlx"})
_ENCODED_ENDINGS = (".compeft", ".int4", ".compeft.safetensors", ".int4.safetensors")


@dataclass(frozen=True)
class Found:
    """What was looked at, of which kind it is, what was checked, facts for programs, and warnings."""

    name: str
    kind: str
    checks: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def path(place: Path) -> list[Found]:
    """An adapter's folder, a checkpoint's folder, a tensor file or an encoded file.

    Raises HeaderInvalid, ConfigInvalid, AdapterInvalid, CheckpointInvalid, EncodedInvalid, OSError.
    """
    if not place.is_dir():
        return [file(place, config=_config_of(place))]
    tensors = sorted(place.glob("*.safetensors"))
    if (place / CONFIG_FILE).is_file() or (place / WEIGHTS_FILE).is_file():
        return [adapter(place), *(file(other) for other in tensors if other.name != WEIGHTS_FILE)]
    has_index = (place / checkpoints.INDEX_FILE).is_file()
    if not tensors and not has_index:
        raise AdapterInvalid(
            f"{place} holds nothing to verify.", pointer=str(place), met="no .safetensors file",
            wanted=f"{CONFIG_FILE} and {WEIGHTS_FILE}, or .safetensors files",
            remedy="Name the folder that holds the adapter or the checkpoint.",
        )  # fmt: skip
    found = [file(one) for one in tensors]
    if has_index:
        with checkpoints.open_checkpoint(place) as opened:
            checks = (f"the index and its shards agree on {len(opened.names)} tensors",)
        found.append(Found(str(place), "checkpoint", checks))
    return found


def adapter(folder: Path) -> Found:
    """Config and weights of a folder, each alone and against each other."""
    record = adapters.parse_config((folder / CONFIG_FILE).read_bytes())
    weights = folder / WEIGHTS_FILE
    head = header.read(weights)
    files.check_agreement(weights, head)
    facts = adapters.check(record, head)
    warnings = adapters.scan_finite(weights, head)
    checks = (
        f"{CONFIG_FILE} is strict JSON of a known kind ({record.peft_type})",
        f"{WEIGHTS_FILE} has a strict header of {len(head.tensors)} tensors, and a second reader agrees",
        f"config and weights fit: {len(facts.modules)} modules, {facts.n_parameters:,} parameters",
        "every value is finite",
    )
    told = {
        "peft_type": record.peft_type,
        "base_model": record.base_model_name_or_path,
        "rank": facts.rank,
        "modules": len(facts.modules),
        "parameters": facts.n_parameters,
        "sha256": files.sha256(weights),
        "bytes": weights.stat().st_size,
    }
    return Found(str(folder), "adapter", checks, told, (*facts.warnings, *warnings))


def file(place: Path, *, config: bytes | None = None) -> Found:
    """A tensor file, or an encoded file by all rules of its format."""
    if is_encoded(place):
        return encoded(place, config=config)
    head = header.read(place, checkpoints.LIMITS)
    files.check_agreement(place, head)
    warnings = adapters.scan_finite(place, head)
    checks = (f"strict header of {len(head.tensors)} tensors, and a second reader agrees", "every value is finite")
    told = {"tensors": len(head.tensors), "sha256": files.sha256(place), "bytes": place.stat().st_size}
    return Found(str(place), "tensors", checks, told, warnings)


def encoded(
    place: Path,
    *,
    config: bytes | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
) -> Found:
    """An encoded file: every rule of its format, the hash of its planes, and the config it belongs to."""
    facts = compression.verify(place, budget=budget)
    checks = [
        f"every rule of {facts['format']}/{facts['version']}",
        f"the hash of its content, {facts['planes_sha256'][:12]}…",
    ]
    if config is not None and facts.get("source") != "checkpoint":
        record = adapters.parse_config(config)
        check_claims(place, record, budget=budget)
        checks.append(f"its tensors are those of {CONFIG_FILE} ({record.peft_type})")
    return Found(str(place), "encoded", tuple(checks), {**facts, "sha256": files.sha256(place)})


def check_claims(place: Path, record: AdapterConfig, *, budget: Budget) -> None:
    """Names, ranks and shapes of an encoded file against a config, decoding nothing. Raises AdapterInvalid."""
    with compression.open_any(place, budget=budget) as opened:
        tensors = {}
        for name in sorted([*opened.entries, *opened.plain]):
            dtype, shape = opened.claim(name)
            tensors[name] = TensorInfo(name, dtype, shape, 0, 0)
    adapters.check(record, Header({}, tensors, 0, 0))


def is_encoded(place: Path) -> bool:
    """Whether a file says of itself that it is in a compressed format, or has the name of one."""
    try:
        return header.read(place, header.COMPEFT).metadata.get("format") not in _OF_FRAMEWORKS
    except HeaderInvalid:
        return place.name.endswith(_ENCODED_ENDINGS)


def _config_of(place: Path) -> bytes | None:
    """The adapter's config beside an encoded file."""
    return config_beside(place, CONFIG_FILE) if is_encoded(place) else None
