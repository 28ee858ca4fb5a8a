"""Folders of experts: read, checked against the model, and opened where they are compressed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge import compression
from moerge.client import examine
from moerge.compression.adapters import CONFIG_FILE, WEIGHTS_FILE
from moerge.errors import AdapterInvalid, MoergeError
from moerge.runtime.errors import NotRoutable
from moerge.tensors import adapters, files, places
from moerge.tensors.adapters import AdapterConfig, AdapterFacts

# What an adapter may do beyond B·A, for it is done here too: DoRA as a stretch, saved modules by `head_of`.
_DONE_HERE = frozenset({"/use_dora", "/modules_to_save"})
_OTHER_BASE = "Load the base model that the expert was trained on."


@dataclass(frozen=True)
class Expert:
    """An expert in a folder that stock PEFT loads; `name` is what usage tells, `sha256` that of its weights.

    `saved` are the shapes of tensors that replace those of the base, by the base's names.
    """

    name: str
    folder: Path
    config: AdapterConfig
    facts: AdapterFacts
    sha256: str
    saved: Mapping[str, tuple[int, ...]]

    @property
    def task_type(self) -> str:
        return str(self.config.raw.get("task_type") or "")


def read(name: str, folder: Path) -> Expert:
    """Config and weights, checked. Raises NotRoutable, AdapterInvalid, ConfigInvalid, HeaderInvalid, OSError."""
    try:
        config = adapters.parse_config((folder / CONFIG_FILE).read_bytes())
        with files.open_file(folder / WEIGHTS_FILE) as file:
            facts = adapters.check(config, file.header)
            saved = {places.of_base_tensor(tensor): file.header.tensors[tensor].shape for tensor in facts.saved}
    except FileNotFoundError as error:
        raise AdapterInvalid(
            f"{name} is no adapter: there is no {Path(error.filename).name} in {folder}.", pointer=name, met="nothing",
            wanted=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="Name the folder that PEFT's save_pretrained wrote.",
        ) from error  # fmt: skip
    except MoergeError as error:
        error.detail = f"{name}: {error.detail}"
        raise
    if facts.kind != "lora":
        raise NotRoutable(
            f"{name} is of kind {config.peft_type}, whose effect is not a delta that can be weighed per token.",
            pointer=name, met=config.peft_type, wanted="LORA", remedy="Leave it out, or merge it first.",
        )  # fmt: skip
    for blocker in facts.blockers:
        if blocker.pointer not in _DONE_HERE:
            raise NotRoutable(
                f"{name} cannot be routed per token: {blocker.reason}, met {blocker.met}.", pointer=blocker.pointer,
                met=blocker.met, wanted="LoRA, rsLoRA or DoRA", remedy="Leave it out.",
            )  # fmt: skip
    return Expert(name, folder, config, facts, files.sha256(folder / WEIGHTS_FILE), saved)


def opened(folder: Path, place: Path) -> Path:
    """A folder that stock PEFT loads: the one given, or `place`, into which a compressed expert is decoded.

    `folder` may be one that holds a compressed file beside adapter_config.json, or such a file.
    """
    if (folder / WEIGHTS_FILE).is_file() and not examine.is_encoded(folder / WEIGHTS_FILE):
        return folder
    candidates = [folder] if folder.is_file() else sorted(path for path in folder.glob("*") if path.is_file())
    for path in candidates:
        if path.suffix != ".json" and examine.is_encoded(path):
            beside = folder / CONFIG_FILE
            config = beside.read_bytes() if beside.is_file() else None
            compression.decompress(path, place, config=config)
            return place
    return folder


def check_modules(experts: Sequence[Expert], base: Any) -> None:
    """Every module that an expert adapts is in the model, a linear layer, and of its shape. Raises NotRoutable.

    What an expert replaces must have the model's shape too.
    """
    found: Mapping[str, Any] = dict(base.named_modules())
    tensors: Mapping[str, Any] = dict(base.named_parameters())
    for expert in experts:
        for name, shape in expert.saved.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                met = list(tensors[name].shape) if name in tensors else "no such tensor"
                raise NotRoutable(
                    f"{expert.name} replaces {name}, which the model does not have in this shape.", pointer=name,
                    met=f"{list(shape)} in the expert", wanted=str(met),
                    remedy="Load the model with as many labels as the expert was trained with.",
                )  # fmt: skip
    for expert in experts:
        for module, shape in expert.facts.shapes.items():
            layer = found.get(module)
            if layer is None:
                raise NotRoutable(
                    f"{expert.name} adapts {module}, which the model does not have.", pointer=module,
                    met="no such module", wanted="a module of the model", remedy=_OTHER_BASE,
                )  # fmt: skip
            weight = getattr(layer, "weight", None)
            form = type(layer).__name__
            if weight is None or weight.dim() != 2 or expert.facts.layouts[module].form != "linear":
                raise NotRoutable(
                    f"{expert.name} adapts {module}, a {form}, whose input is no row of tokens.", pointer=module,
                    met=form, wanted="a linear layer", remedy="Leave the expert out.",
                )  # fmt: skip
            mine = tuple(weight.shape) if form != "Conv1D" else tuple(weight.shape)[::-1]
            if mine != shape:
                raise NotRoutable(
                    f"{expert.name} does not fit {module} of the model.", pointer=module,
                    met=f"{list(shape)} (out, in)", wanted=f"{list(mine)} (out, in)", remedy=_OTHER_BASE,
                )  # fmt: skip
