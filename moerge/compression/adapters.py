"""Compress the weights of an adapter into a `compeft/1` file, and bring them back for stock PEFT."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moerge.compression import presets, selection
from moerge.compression.codecs import compeft
from moerge.compression.manifest import Budget
from moerge.compression.presets import Settings
from moerge.compression.reader import Encoded, Initial, open_encoded
from moerge.compression.report import Ledger, Report
from moerge.compression.writer import Written
from moerge.tensors import adapters, files
from moerge.tensors.adapters import AdapterConfig
from moerge.tensors.files import BF16, Array, Float32, Lazy, SafetensorsFile

Progress = Callable[[float], None]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def compress_adapter(
    config: bytes | AdapterConfig,
    path: str | Path,
    out_path: str | Path,
    *,
    preset: str = presets.DEFAULT,
    density: float | None = None,
    scale_rule: str | None = None,
    alpha: float | None = None,
    base_parameters: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Encode the weights at `path` to `out_path`; the same input and options give the same bytes.

    Factors of LoRA, rsLoRA and DoRA become ternary, everything else stays as it is. Without a `density`, the size of
    the base model decides (`selection.density_for`). `progress` hears the share that is done, 0 to 1. The file appears
    at `out_path` whole or not at all. Raises ParameterInvalid, ConfigInvalid, HeaderInvalid, AdapterInvalid, OSError.
    """
    record = adapters.parse_config(config) if isinstance(config, bytes) else config
    given: dict[str, Any] = {"preset": preset, "scale_rule": scale_rule, "alpha": alpha}
    wanted = compeft.settings(
        given | {"density": selection.density_for(base_parameters) if density is None else density}
    )
    source_sha256 = files.sha256(path)
    with files.open_file(path) as file, _replacing(Path(out_path)) as stream:
        is_lora = record.peft_type == "LORA"
        source = _File(file, progress or _silent, is_lora=is_lora, passes=presets.passes(wanted))
        plain = {name: _lazy(file, name) for name in file.names}
        metadata = {"source_sha256": source_sha256, "base_model": record.base_model_name_or_path or ""}
        written, ledger = compeft.write(stream, source, plain, wanted, initial={}, metadata=metadata)
    if progress:
        progress(1.0)
    return _report(wanted, ledger, written, source_sha256=source_sha256, path=Path(path), out_path=Path(out_path))


def decompress(
    path: str | Path,
    out_dir: str | Path,
    *,
    config: bytes | None = None,
    initial: Initial | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen record
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write `adapter_model.safetensors`, and the config beside it, so that stock PEFT loads the folder.

    The config is `config`, or an `adapter_config.json` that lies beside `path`; with neither, only weights are written.
    The whole file is checked before the first tensor is decoded. Returns the path of the weights. Raises
    EncodedInvalid, OSError.
    """
    folder = Path(out_dir)
    beside = Path(path).parent / CONFIG_FILE
    if config is None and beside.is_file():
        config = beside.read_bytes()
    with open_encoded(path, budget=budget, expected=expected) as encoded:
        encoded.verify()
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted([*encoded.entries, *encoded.plain])
        tensors = {name: _decoded(encoded, name, initial) for name in names}
        with _replacing(folder / WEIGHTS_FILE) as stream:
            files.dump(stream, tensors, {"format": "pt"})
    if config is not None:
        with _replacing(folder / CONFIG_FILE) as stream:
            stream.write(config)
    return folder / WEIGHTS_FILE


class _File:
    """A safetensors file as a source; an adapter that is not LoRA shows no factors, so all of it stays as it is."""

    def __init__(self, file: SafetensorsFile, progress: Progress, *, is_lora: bool, passes: int) -> None:
        self._file = file
        self._progress = progress
        self._is_lora = is_lora
        self._total = passes * sum(file.info(name).size for name in selection.factors(self.names())) or 1
        self._done = 0

    def names(self) -> list[str]:
        return list(self._file.names) if self._is_lora else []

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        info = self._file.info(name)
        return info.dtype, info.shape

    def float32(self, name: str) -> Float32:
        values = self._file.float32(name)
        self._done += values.size
        # The last part is for the planes, which are deflated when all tensors have passed.
        self._progress(0.95 * min(1.0, self._done / self._total))
        return values


def _silent(share: float) -> None:
    """For callers who do not watch."""


def _lazy(file: SafetensorsFile, name: str) -> Lazy:
    info = file.info(name)

    def make() -> Array | BF16:
        values = file.array(name)
        return BF16(values) if info.dtype == "BF16" else values

    return Lazy(info.dtype, info.shape, make)


def _decoded(encoded: Encoded, name: str, initial: Initial | None) -> Lazy:
    dtype, shape = encoded.claim(name)
    return Lazy(dtype, shape, lambda: encoded.tensor(name, initial))


def _report(
    wanted: Settings, ledger: Ledger, written: Written, *, source_sha256: str, path: Path, out_path: Path
) -> Report:
    size = sum(tensor.size for tensor in ledger.tensors)
    warnings = list(ledger.warnings)
    if not ledger.tensors:
        warnings.append("Nothing in this adapter is made ternary: it has no LoRA factor of at least 1,024 values.")
    return Report(
        preset=wanted.preset,
        scale_rule=wanted.scale_rule,
        density=wanted.density,
        alpha=wanted.alpha,
        size=size,
        kept=sum(tensor.kept for tensor in ledger.tensors),
        cosine=ledger.all.cosine(),
        rel_error=ledger.all.rel_error(),
        product_cosine=ledger.products.cosine(),
        product_rel_error=ledger.products.rel_error(),
        sigma_ratio=ledger.sigma_ratio(),
        ternary_bytes=written.ternary_bytes,
        ternary_original_bytes=2 * size,
        bytes=out_path.stat().st_size,
        original_bytes=path.stat().st_size,
        sha256=files.sha256(out_path),
        planes_sha256=written.planes_sha256,
        source_sha256=source_sha256,
        warnings=tuple(warnings),
        tensors=tuple(ledger.tensors),
        modules=tuple(ledger.modules),
    )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside `path` that takes its place at the end, and leaves nothing behind on failure."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
