"""What an expert is measured as: original, without adapter, and compressed in several ways, by the code that serves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from benchmarks.quality import encoder
from benchmarks.quality.encoder import Base
from moerge import compression
from moerge.compression.report import Report

PRESETS = {"lora": ("paper", "default", "hq"), "ia3": ("paper", "default"), "full": ("paper", "default")}
LONE_RULES = ("unbiased", "norm", "mse")


@dataclass(frozen=True)
class Variant:
    """One way to look at an expert. `preset` is None for the original and for the base alone."""

    name: str
    preset: str | None = None
    density: float | None = None
    scale_rule: str | None = None

    @property
    def label(self) -> str:
        """The name with its density, for people."""
        return self.name if self.density is None else f"{self.name}, k = {self.density:.0%}"


ORIGINAL, ABSENT, INT4 = Variant("original"), Variant("no adapter"), Variant("int4", "int4")


def at(preset: str, density: float) -> Variant:
    """A preset with its own scale rule."""
    return Variant(preset, preset, density)


def of_kind(kind: str, densities: Sequence[float]) -> list[Variant]:
    """The variants of experts of a kind; tensors without a partner also by every scale rule."""
    found = [ORIGINAL, ABSENT, *(at(preset, density) for preset in PRESETS[kind] for density in densities)]
    if kind != "lora":
        found += [Variant(f"rule {rule}", "default", density, rule) for rule in LONE_RULES for density in densities]
    return [*found, INT4] if kind == "lora" else found


def compressed(kind: str, folder: Path, variant: Variant, place: Path, base: Base) -> tuple[Report, Path]:
    """Compress an expert's folder and bring it back; returns the report and the folder to load."""
    small, decoded = place / "expert.compeft", place / "decoded"
    options: dict[str, Any] = {"preset": variant.preset, "density": variant.density, "scale_rule": variant.scale_rule}
    if kind == "full":
        report = compression.compress(folder, small, base=base.folder, **options)
        compression.decompress(small, decoded, base=base.folder)
        return report, decoded
    config = (folder / "adapter_config.json").read_bytes()
    weights = folder / "adapter_model.safetensors"
    if kind == "ia3":
        options["include"] = ("ia3",)
    report = compression.compress_adapter(config, weights, small, **options)
    compression.decompress(small, decoded, config=config)
    return report, decoded


def load(kind: str, folder: Path, base: Base) -> Any:
    """The encoder that stock PEFT or transformers makes of a folder; an adapter is merged into its base."""
    if kind == "full":
        return encoder.load_model(folder)
    return peft.PeftModel.from_pretrained(base.fresh(), folder).merge_and_unload()
