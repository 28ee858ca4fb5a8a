"""Full output: the base's checkpoint with the merged changes added, tensor by tensor, as the base is cut into files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moerge.errors import ExpertsIncompatible
from moerge.merging.experts import Brought, Place
from moerge.merging.outputs import DTYPES, Slots, Targets, as_float32, check_finite, whole_of
from moerge.merging.ranks import Spectrum
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Delta
from moerge.tensors.adapters import BaseWeights
from moerge.tensors.checkpoints import INDEX_FILE
from moerge.tensors.files import Float32, SafetensorsFile
from moerge.tensors.header import ITEM_BYTES

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# What transformers reads beside the weights. Code and weights in other formats stay where they are.
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_CONFIG = "config.json"
# What models call the embedding that a tied head shares, and that head.
_EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
)
_WITH_HEAD = ("ForCausalLM", "LMHead", "ForMaskedLM", "ForConditionalGeneration")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


class FullWriter:
    """The base with the merge added. Each tensor is added in float32 and rounded once to its own dtype, or to the one
    asked for; what nobody changed is copied byte for byte.
    """

    def __init__(
        self, recipe: Recipe, brought: Brought, folder: Path, *, base: BaseWeights, watch: Callable[[], None]
    ) -> None:
        self._recipe, self._brought, self._folder, self._base, self._watch = recipe, brought, folder, base, watch
        self._targets = Targets(brought, base)
        for name, one in brought.kept.items():
            self._targets.add_kept(name, one.shape)
        self._asked = DTYPES[recipe.output.dtype] if recipe.output.dtype else None
        self._left = set(base.names)
        self._check_dtypes()
        self._check_tied()
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Slots] = {}
        for file, names in self._by_file().items():
            claims = {name: (self._dtype(name), tuple(base.checkpoint.info(name).shape)) for name in names}
            metadata = base.checkpoint.file_of(names[0]).metadata or {"format": "pt"}
            self._files[file] = Slots(folder / file, claims, metadata)

    @property
    def _beside(self) -> Path:
        """The folder that the base's files lie in."""
        return self._base.folder if self._base.folder.is_dir() else self._base.folder.parent

    def put(self, place: Place, delta: Delta) -> tuple[Spectrum, int | None]:
        check_finite(self._recipe, place, delta)
        values = as_float32(delta)
        check_finite(self._recipe, place, values)
        name = self._targets.names[place.key]
        own = self._base.checkpoint.float32(name)
        own += self._targets.stored(place, values)
        self._put(name, own)
        return whole_of(values), None

    def finish(self) -> None:
        for name, one in self._brought.kept.items():
            self._put(self._targets.names[f"{name} (kept)"], one.values())
        for name in sorted(self._left):
            self._watch()
            source = self._base.checkpoint.file_of(name)
            if self._dtype(name) == source.info(name).dtype:
                self._slots(source).pour(name, source)
            else:
                self._slots(source).put(name, source.float32(name))
        for slots in self._files.values():
            slots.close()
        self._write_index()
        copy_beside(self._beside, self._folder, self._recipe.output.dtype)

    def discard(self) -> None:
        for file, slots in self._files.items():
            slots.close()
            (self._folder / file).unlink(missing_ok=True)

    def _put(self, name: str, values: Float32) -> None:
        self._slots(self._base.checkpoint.file_of(name)).put(name, values)
        self._left.discard(name)

    def _slots(self, source: SafetensorsFile) -> Slots:
        return self._files[source.path.name]

    def _by_file(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._base.names:
            found.setdefault(self._base.checkpoint.file_of(name).path.name, []).append(name)
        return found

    def _dtype(self, name: str) -> str:
        own = self._base.checkpoint.info(name).dtype
        return self._asked if self._asked and own in _FLOATS else own

    def _check_dtypes(self) -> None:
        """Raise ExpertsIncompatible when a tensor that is to change holds no floating-point values."""
        for name in self._targets.shapes:
            met = self._base.checkpoint.info(name).dtype
            if met not in _FLOATS:
                raise ExpertsIncompatible(
                    f"{name} of the base is {met}, so nothing can be added to it.",
                    pointer="/output/kind",
                    met=met,
                    wanted="a base in floating point",
                    remedy="Ask for output lora or delta, or put the unquantised base into the hub.",
                )

    def _check_tied(self) -> None:
        """Raise ExpertsIncompatible when what changes the embedding would change a head that is tied to it too."""
        if not self._is_tied():
            return
        for key, name in self._targets.names.items():
            if name.endswith(_EMBEDDINGS):
                raise ExpertsIncompatible(
                    f"{name} is also the head of this base, and {key} changes it as an embedding alone.",
                    pointer="/output/kind",
                    met=name,
                    wanted="a base whose head is a tensor of its own",
                    remedy="Ask for output lora, which changes the embedding alone.",
                )

    def _is_tied(self) -> bool:
        """Whether the base's head is its embedding. Configs leave that out where it is the rule of transformers."""
        config = self._beside / _CONFIG
        if not config.is_file() or any(name.endswith(_HEADS) for name in self._base.names):
            return False
        told = json.loads(config.read_bytes())
        kinds = told.get("architectures") or []
        return bool(told.get("tie_word_embeddings", any(word in kind for kind in kinds for word in _WITH_HEAD)))

    def _write_index(self) -> None:
        if not (self._beside / INDEX_FILE).is_file():
            return
        sizes = {name: self._bytes(name) for name in self._base.names}
        record = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: self._base.checkpoint.file_of(name).path.name for name in self._base.names},
        }
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _bytes(self, name: str) -> int:
        return self._base.checkpoint.info(name).size * ITEM_BYTES[self._dtype(name)]


def copy_beside(folder: Path, out: Path, dtype: str | None) -> None:
    """Copy what lies beside a model's weights; the config names the dtype that was asked for, where one was."""
    for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, out / path.name)
    config = out / _CONFIG
    if dtype and config.is_file():
        record: dict[str, Any] = json.loads(config.read_bytes())
        # transformers 5 writes dtype, its elders torch_dtype.
        key = "dtype" if "dtype" in record else "torch_dtype"
        text = json.dumps({**record, key: dtype}, indent=2, sort_keys=True) + "\n"
        config.write_text(text, encoding="utf-8")
