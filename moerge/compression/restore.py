"""The way back: open whatever `compress` writes, check it, and write what stock PEFT or transformers load."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from moerge.compression import shell
from moerge.compression.adapters import CHECKPOINT_CONFIG_FILE, CONFIG_FILE, WEIGHTS_FILE, replacing, sidecar
from moerge.compression.codecs.int4 import Quantised
from moerge.compression.container import Container, Initial
from moerge.compression.manifest import Budget
from moerge.compression.reader import Encoded
from moerge.compression.rules import refuse
from moerge.compression.source import open_source
from moerge.errors import BaseMismatch
from moerge.tensors import checkpoints, files
from moerge.tensors.checkpoints import Checkpoint, open_checkpoint
from moerge.tensors.files import BF16, Array, Lazy

_READERS: Mapping[str, Callable[..., Container[Any]]] = {"compeft": Encoded, "int4": Quantised}


def open_any(
    data: bytes | bytearray | memoryview | str | Path,
    *,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> Container[Any]:
    """Open an encoded file of any container and check rules 1 to 4. Raises EncodedInvalid, OSError."""
    source = open_source(data)
    try:
        found = shell.format_of(source)
        if found not in _READERS:
            refuse("C1.format", "__metadata__", met=ascii(found)[:80], wanted=" or ".join(_READERS))
        return _READERS[found](source, budget=budget, expected=expected)
    except BaseException:
        source.close()
        raise


def verify(
    path: str | Path,
    *,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
) -> dict[str, Any]:
    """Check every rule and the hash of a file; returns what it says of itself. Raises EncodedInvalid, OSError."""
    with open_any(path, budget=budget) as encoded:
        encoded.verify()
        return {
            **encoded.metadata,
            "file_bytes": encoded.file_bytes,
            "encoded_bytes": encoded.encoded_bytes,
            "encoded_tensors": len(encoded.entries),
            "plain_tensors": len(encoded.plain),
        }


def decompress(
    path: str | Path,
    out_dir: str | Path,
    *,
    config: bytes | None = None,
    base: str | Path | None = None,
    initial: Initial | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Write the weights and the config beside them, so that stock PEFT loads the folder; a checkpoint for transformers.

    The config is `config`, or what `compress` laid beside `path`, or an `adapter_config.json` there; with none, only
    weights are written. Differences need `base`, whose SHA-256 must be the one in the file, or `initial`. The whole
    file is checked before the first tensor is decoded. `progress` hears the share of the tensors that is written.
    Returns the path of the weights. Raises EncodedInvalid, BaseMismatch, OSError.
    """
    folder, path = Path(out_dir), Path(path)
    with open_any(path, budget=budget, expected=expected) as encoded:
        encoded.verify()
        is_checkpoint = encoded.metadata.get("source") == "checkpoint"
        names = sorted([*encoded.entries, *encoded.plain])
        needs_base = initial is None and any(entry.init == "base" for entry in encoded.entries.values())
        checkpoint = _base_of(encoded, base) if needs_base else None
        try:
            read = encoded.reader(initial if checkpoint is None else _from_base(encoded, checkpoint))
            folder.mkdir(parents=True, exist_ok=True)
            weights = folder / (checkpoints.WEIGHTS_FILE if is_checkpoint else WEIGHTS_FILE)
            read = _told(encoded, names, read, progress) if progress else read
            with replacing(weights) as stream:
                files.dump(stream, {name: _decoded(encoded, name, read) for name in names}, {"format": "pt"})
        finally:
            if checkpoint is not None:
                checkpoint.close()
    config_name = CHECKPOINT_CONFIG_FILE if is_checkpoint else CONFIG_FILE
    config = config if config is not None else config_beside(path, config_name)
    if config is not None:
        with replacing(folder / config_name) as stream:
            stream.write(config)
    return weights


def _base_of(encoded: Container[Any], base: str | Path | None) -> Checkpoint:
    """The base checkpoint, when it is the one that the differences were taken from."""
    name = encoded.metadata.get("base_model") or "its base model"
    wanted = encoded.metadata.get("base_sha256", "")
    if base is None:
        raise BaseMismatch(
            f"This file holds differences from {name[:200]}, and no base was given.", pointer="base", met="no base",
            wanted=f"a checkpoint with SHA-256 {wanted}", remedy="Pass the folder of the base checkpoint with --base.",
        )  # fmt: skip
    checkpoint = open_checkpoint(base)
    met = checkpoint.sha256()
    if met != wanted:
        checkpoint.close()
        raise BaseMismatch(
            "This is not the base that the differences were taken from.", pointer="base", met=f"SHA-256 {met}",
            wanted=f"SHA-256 {wanted}", remedy=f"Pass the checkpoint of {name[:200]} that was used for compressing.",
        )  # fmt: skip
    return checkpoint


def _from_base(encoded: Container[Any], checkpoint: Checkpoint) -> Initial:
    def read(name: str) -> Array | BF16:
        found = checkpoint.same_as(name, encoded.claim(name)[1])
        if found is None:
            raise BaseMismatch(
                f"The base has no tensor for {name}.", pointer=name, met="no tensor of this name and shape",
                wanted=f"shape {list(encoded.claim(name)[1])}", remedy="Pass the checkpoint used for compressing.",
            )  # fmt: skip
        return checkpoint.tensor(found)

    return read


def _told(
    encoded: Container[Any],
    names: list[str],
    read: Callable[[str], Array | BF16],
    progress: Callable[[float], None],
) -> Callable[[str], Array | BF16]:
    """`read` that tells how much has been read."""
    sizes = {name: max(1, prod(encoded.claim(name)[1])) for name in names}
    total, done = sum(sizes.values()), 0

    def watched(name: str) -> Array | BF16:
        nonlocal done
        made = read(name)
        done += sizes[name]
        progress(done / total)
        return made

    return watched


def _decoded(encoded: Container[Any], name: str, read: Callable[[str], Array | BF16]) -> Lazy:
    return Lazy(*encoded.claim(name), lambda: read(name))


def config_beside(path: Path, name: str) -> bytes | None:
    """The config that `compress` laid beside an encoded file, or that of the folder it lies in."""
    for place in (sidecar(path, name), path.parent / name):
        if place.is_file():
            return place.read_bytes()
    return None
