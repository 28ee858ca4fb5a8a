"""Compress the weights of an adapter, or of a full fine-tune against its base, into one file."""

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moerge.compression import presets, selection
from moerge.compression.arithmetic import NUMPY, Arithmetic
from moerge.compression.codecs import compeft, int4
from moerge.compression.differences import Start
from moerge.compression.presets import Settings
from moerge.compression.report import Ledger, Report
from moerge.compression.writer import Written
from moerge.errors import AdapterInvalid, BaseMismatch, ParameterInvalid
from moerge.tensors import adapters, files
from moerge.tensors.adapters import AdapterConfig
from moerge.tensors.checkpoints import Checkpoint, open_checkpoint
from moerge.tensors.files import BF16, Float32, Lazy, Streamed
from moerge.tensors.header import Limits

Progress = Callable[[float], None]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CHECKPOINT_CONFIG_FILE = "config.json"
INT4 = int4.SPEC.name
PRESETS = (presets.DEFAULT, presets.PAPER, presets.HQ, INT4)
# What is left as it is unless the caller asks: IA3's vectors, and saved copies of base tensors.
IA3, SAVED = "ia3", "saved"
INCLUDES = (IA3, SAVED)
# A difference from a base keeps its likelihood by the unbiased scale (docs/compeft-quality.md).
_DELTA_RULE = "unbiased"


def compress(
    path: str | Path,
    out_path: str | Path,
    *,
    base: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Encode a PEFT folder, or a full checkpoint against `base`, and lay its config beside the file.

    A checkpoint is a folder with `model.safetensors` or an index of shards, or one safetensors file. The config goes to
    `<out>.adapter_config.json` or `<out>.config.json`, where `decompress` finds it. `options` are those of
    `compress_adapter`. Raises what that raises, CheckpointInvalid and BaseMismatch.
    """
    path, out_path = Path(path), Path(out_path)
    folder = path if path.is_dir() else path.parent
    is_adapter = (folder / CONFIG_FILE).is_file() and (path.is_dir() or path.name == WEIGHTS_FILE)
    if is_adapter:
        if not (folder / WEIGHTS_FILE).is_file():
            raise AdapterInvalid(
                f"{folder.name} has a config but no {WEIGHTS_FILE}.", pointer=WEIGHTS_FILE, met="no such file",
                wanted="weights in safetensors", remedy="Save the adapter with PeftModel.save_pretrained.",
            )  # fmt: skip
        config = (folder / CONFIG_FILE).read_bytes()
        report = compress_adapter(config, folder / WEIGHTS_FILE, out_path, base=base, progress=progress, **options)
        sidecar(out_path, CONFIG_FILE).write_bytes(config)
        return report
    report = _compress_checkpoint(path, out_path, base=base, progress=progress or _silent, **options)
    if (folder / CHECKPOINT_CONFIG_FILE).is_file():
        sidecar(out_path, CHECKPOINT_CONFIG_FILE).write_bytes((folder / CHECKPOINT_CONFIG_FILE).read_bytes())
    return report


def compress_adapter(
    config: bytes | AdapterConfig,
    path: str | Path,
    out_path: str | Path,
    *,
    preset: str = presets.DEFAULT,
    density: float | None = None,
    scale_rule: str | None = None,
    alpha: float | None = None,
    base: str | Path | None = None,
    include: Collection[str] = (),
    heads: str | None = None,
    base_parameters: int | None = None,
    arithmetic: Arithmetic = NUMPY,
    progress: Progress | None = None,
) -> Report:
    """Encode the weights at `path` to `out_path`; the same input and options give the same bytes.

    Factors of LoRA, rsLoRA and DoRA are encoded, everything else stays as it is. `include` names what else is: "ia3",
    the vectors of IA3 (initial value 1), and "saved", modules to save that `base` holds with the same shape, as
    differences from it. `heads="bf16"` stores what is left of the saved modules in bfloat16. Without a `density`, the
    size of the base model decides (`selection.density_for`). `progress` hears the share that is done, 0 to 1. The file
    appears at `out_path` whole or not at all. Raises ParameterInvalid, ConfigInvalid, HeaderInvalid, AdapterInvalid,
    BaseMismatch, OSError.
    """
    record = adapters.parse_config(config) if isinstance(config, bytes) else config
    codec, wanted = _settings(preset, density=density, scale_rule=scale_rule, alpha=alpha,
                              base_parameters=base_parameters)  # fmt: skip
    _check_choices(include, heads)
    told = progress or _silent
    path = Path(path)
    with Checkpoint({path.name: path}, Limits()) as weights, _opened(base) as start:
        saved = _saved(record, weights) if SAVED in include or heads else ()
        initial: dict[str, Start] = {}
        if IA3 in include and record.peft_type == "IA3":
            initial |= {name: 1 for name in weights.names if name.endswith(".ia3_l")}
        if SAVED in include:
            initial |= _from_base(weights, start, saved)
        plain = _plain(weights, in_bf16=saved if heads else ())
        metadata = {"base_model": record.base_model_name_or_path or ""}
        source = _Weights(weights, shows_factors=record.peft_type == "LORA")
        return _write(codec, wanted, source, plain, initial=initial, start=start, metadata=metadata,
                      out_path=Path(out_path), arithmetic=arithmetic, progress=told)  # fmt: skip


def _compress_checkpoint(
    path: Path,
    out_path: Path,
    *,
    base: str | Path | None,
    progress: Progress,
    preset: str = presets.DEFAULT,
    density: float | None = None,
    scale_rule: str | None = None,
    alpha: float | None = None,
    include: Collection[str] = (),
    heads: str | None = None,
    base_parameters: int | None = None,
    arithmetic: Arithmetic = NUMPY,
) -> Report:
    """A full fine-tune: matrices become differences from the base, what the base does not have stays as it is.

    The published rule takes vectors too, as its release does; the other presets leave them as they are.
    """
    _check_choices(include, heads)
    with open_checkpoint(path) as weights:
        if base is None:
            raise BaseMismatch(
                f"{path.name} is a full checkpoint, not an adapter; only its difference from the base is compressed.",
                pointer="base", met="no base", wanted="the checkpoint it was trained from",
                remedy="Pass the base with --base, or the folder of an adapter with its adapter_config.json.",
            )  # fmt: skip
        with open_checkpoint(base) as start:
            count = sum(start.info(name).size for name in start.names)
            codec, wanted = _settings(preset, density=density, scale_rule=scale_rule, alpha=alpha,
                                      base_parameters=base_parameters or count)  # fmt: skip
            chosen = [name for name in weights.names if _is_matrix(weights, name) or wanted.preset == presets.PAPER]
            initial = _from_base(weights, start, chosen)
            if not initial:
                raise BaseMismatch(
                    f"No matrix of {path.name} has a tensor of the same name and shape in the base.", pointer="base",
                    met=f"{len(weights.names)} tensors, none of them in the base", wanted="the base of this checkpoint",
                    remedy="Pass the checkpoint it was trained from.",
                )  # fmt: skip
            rest = [name for name in weights.names if name not in initial]
            plain = _plain(weights, in_bf16=rest if heads else ())
            metadata = {"base_model": Path(base).name, "source": "checkpoint"}
            return _write(codec, wanted, _Weights(weights, shows_factors=False), plain, initial=initial, start=start,
                          metadata=metadata, out_path=out_path, arithmetic=arithmetic, progress=progress)  # fmt: skip


def compress_delta(
    path: str | Path,
    out_path: str | Path,
    *,
    density: float,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Encode every tensor of a dense task vector, a safetensors file of what is to be added to a base, one at a time.

    The same input and density give the same bytes; what is decoded is the task vector again. Raises ParameterInvalid,
    HeaderInvalid, AdapterInvalid for values that are not finite, OSError.
    """
    codec, wanted = _settings(presets.DEFAULT, density=density, scale_rule=_DELTA_RULE, alpha=None,
                              base_parameters=None)  # fmt: skip
    with open_checkpoint(path) as weights:
        metadata = {"base_model": base_model or "", "source": "delta"}
        return _write(codec, wanted, _Weights(weights, shows_factors=False), _plain(weights, in_bf16=()),
                      initial=dict.fromkeys(weights.names, 0), start=None, metadata=metadata, out_path=Path(out_path),
                      arithmetic=NUMPY, progress=progress or _silent)  # fmt: skip


def sidecar(out_path: Path, name: str) -> Path:
    """Where the config of an encoded file lies."""
    return out_path.with_name(f"{out_path.name}.{name}")


def _settings(
    preset: str, *, density: float | None, scale_rule: str | None, alpha: float | None, base_parameters: int | None
) -> tuple[Any, Settings]:
    """The codec of a preset and its settings. Raises ParameterInvalid."""
    given = {"scale_rule": scale_rule, "alpha": alpha}
    if preset == INT4:
        for name, value in {"density": density, **given}.items():
            if value is not None:
                raise ParameterInvalid(
                    f"The preset int4 keeps every value, so it has no {name}.", pointer=name, met=value,
                    wanted=f"no {name}", remedy=f"Leave {name} out, or choose another preset.",
                )  # fmt: skip
        return int4, int4.settings({})
    share = selection.density_for(base_parameters) if density is None else density
    return compeft, compeft.settings({"preset": preset, "density": share, **given})


def _check_choices(include: Collection[str], heads: str | None) -> None:
    for name in include:
        if name not in INCLUDES:
            raise ParameterInvalid(
                f"There is no {ascii(name)[:40]} to include.", pointer="include", met=ascii(name)[:40],
                wanted=", ".join(INCLUDES), remedy="Name what else is to be compressed, or leave it out.",
            )  # fmt: skip
    if heads not in {None, "bf16"}:
        raise ParameterInvalid(
            f"Heads cannot be stored as {ascii(heads)[:40]}.", pointer="heads", met=ascii(heads)[:40], wanted="bf16",
            remedy="Leave it out to keep heads exactly as they are.",
        )  # fmt: skip


def _write(
    codec: Any,
    wanted: Settings,
    source: "_Weights",
    plain: Mapping[str, files.Tensor],
    *,
    initial: Mapping[str, Start],
    start: Checkpoint | None,
    metadata: Mapping[str, str],
    out_path: Path,
    arithmetic: Arithmetic,
    progress: Progress,
) -> Report:
    source_sha256 = source.weights.sha256(_between(progress, 0.0, 0.1))
    facts = {"source_sha256": source_sha256, **metadata}
    if start is not None and any(not isinstance(value, int) for value in initial.values()):
        facts["base_sha256"] = start.sha256()
    names = presets.chosen(source, wanted.preset, initial)
    source.watch(names, _between(progress, 0.1, 0.85), passes=presets.passes(wanted))
    with replacing(out_path) as stream:
        written, ledger = codec.write(stream, source, plain, wanted, initial=initial, metadata=facts,
                                      arithmetic=arithmetic, progress=_between(progress, 0.85, 0.95))  # fmt: skip
    report = _report(wanted, ledger, written, source_sha256=source_sha256, weights=source.weights, out_path=out_path)
    progress(1.0)
    return report


class _Weights:
    """A checkpoint as a source that tells how much of it was read; LoRA factors show only where they are meant."""

    def __init__(self, weights: Checkpoint, *, shows_factors: bool) -> None:
        self.weights = weights
        self._names = list(weights.names) if shows_factors else []
        self._progress: Progress = _silent
        self._total, self._done = 1, 0

    def watch(self, names: Collection[str], progress: Progress, *, passes: int) -> None:
        """Tell `progress` the share read of these tensors, each of which is read so many times."""
        self._progress = progress
        self._total = passes * sum(self.weights.info(name).size for name in names) or 1

    def names(self) -> list[str]:
        return self._names

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        info = self.weights.info(name)
        return info.dtype, info.shape

    def float32(self, name: str) -> Float32:
        values = self.weights.float32(name)
        self._done += values.size
        self._progress(min(1.0, self._done / self._total))
        return values


def _silent(share: float) -> None:
    """For callers who do not watch."""


def _between(progress: Progress, low: float, high: float) -> Progress:
    """Progress of a part of the work, from `low` to `high` of the whole."""
    return lambda share: progress(low + (high - low) * share)


@contextmanager
def _opened(base: str | Path | None) -> Iterator[Checkpoint | None]:
    if base is None:
        yield None
        return
    with open_checkpoint(base) as checkpoint:
        yield checkpoint


def _is_matrix(weights: Checkpoint, name: str) -> bool:
    info = weights.info(name)
    return len(info.shape) > 1 and info.size >= selection.SMALLEST


def _saved(record: AdapterConfig, weights: Checkpoint) -> tuple[str, ...]:
    """Names of the tensors that replace some of the base. Raises AdapterInvalid."""
    return adapters.check(record, weights.file_of(weights.names[0]).header).saved if weights.names else ()


def _from_base(weights: Checkpoint, start: Checkpoint | None, names: Collection[str]) -> dict[str, Start]:
    """Names of float tensors that the base holds too, each with a function that reads it there."""
    if start is None:
        raise BaseMismatch(
            "Saved modules are compressed as differences from the base, and no base was given.", pointer="base",
            met="no base", wanted="the checkpoint it was trained from", remedy="Pass the base with --base.",
        )  # fmt: skip
    found: dict[str, Start] = {}
    for name in names:
        info = weights.info(name)
        other = start.same_as(name, info.shape)
        if other is not None and {info.dtype, start.info(other).dtype} <= {"F32", "F16", "BF16"}:
            found[name] = _reader(start, other)
    return found


def _reader(start: Checkpoint, name: str) -> Callable[[], files.Array | BF16]:
    return lambda: start.tensor(name)


def _plain(weights: Checkpoint, *, in_bf16: Collection[str]) -> dict[str, files.Tensor]:
    """Every tensor as it stays when it is not encoded: its own bytes, or rounded to bfloat16."""
    small = {name for name in in_bf16 if weights.info(name).dtype in {"F32", "F64"}}
    return {name: _rounded(weights, name) if name in small else _as_it_is(weights, name) for name in weights.names}


def _as_it_is(weights: Checkpoint, name: str) -> Streamed:
    info = weights.info(name)
    return Streamed(info.dtype, info.shape, lambda: files.raw_blocks(weights.file_of(name), name))


def _rounded(weights: Checkpoint, name: str) -> Lazy:
    return Lazy("BF16", weights.info(name).shape, lambda: BF16(files.to_bf16(weights.float32(name))))


def _report(
    wanted: Settings, ledger: Ledger, written: Written, *, source_sha256: str, weights: Checkpoint, out_path: Path
) -> Report:
    size = sum(tensor.size for tensor in ledger.tensors)
    warnings = list(ledger.warnings)
    if not ledger.tensors:
        warnings.append("Nothing in this adapter is compressed: it has no LoRA factor of at least 1,024 values.")
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
        ternary_bytes=written.plane_bytes,
        ternary_original_bytes=2 * size,
        bytes=out_path.stat().st_size,
        original_bytes=weights.file_bytes,
        sha256=files.sha256(out_path),
        planes_sha256=written.planes_sha256,
        source_sha256=source_sha256,
        warnings=tuple(warnings),
        tensors=tuple(ledger.tensors),
        modules=tuple(ledger.modules),
    )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside `path` that takes its place at the end, and leaves nothing behind on failure."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
