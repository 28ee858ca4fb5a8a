"""Full checkpoints: one safetensors file, or shards with an index, read as one set of tensors."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from moerge.errors import CheckpointInvalid
from moerge.tensors import files, header, strict
from moerge.tensors.files import BF16, Array, Float32, SafetensorsFile
from moerge.tensors.header import Limits, TensorInfo

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_INDEX_KEYS = 1_000_000
# Checkpoints hold integers too, such as position ids.
LIMITS = Limits(dtypes=frozenset(header.ITEM_BYTES), empty_tensors=True)
_SAVE_AGAIN = "Save the model with save_pretrained, which writes safetensors."


class Checkpoint:
    """Tensors of a checkpoint by name, read one at a time. A context manager."""

    def __init__(self, paths: Mapping[str, Path], limits: Limits = LIMITS) -> None:
        """`paths` are the shards by file name."""
        self._paths = dict(sorted(paths.items()))
        self._files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            for name, path in self._paths.items():
                file = files.open_file(path, limits)
                self._files.append(file)
                for tensor in file.names:
                    if tensor in self._home:
                        raise _invalid(f"The tensor {tensor} lies in two shards.", name, tensor, "every tensor once")
                    self._home[tensor] = file
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give all files back."""
        for file in self._files:
            file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return tuple(sorted(self._home))

    @property
    def file_bytes(self) -> int:
        """Of all shards together."""
        return sum(path.stat().st_size for path in self._paths.values())

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        return self._home[name].info(name)

    def file_of(self, name: str) -> SafetensorsFile:
        """The shard that holds a tensor. Raises KeyError."""
        return self._home[name]

    def tensor(self, name: str) -> Array | BF16:
        """One tensor in its own dtype."""
        values = self._home[name].array(name)
        return BF16(values) if self.info(name).dtype == "BF16" else values

    def float32(self, name: str) -> Float32:
        """One tensor as float32, the caller's own."""
        return self._home[name].float32(name)

    def file_digests(self, progress: Callable[[float], None] | None = None) -> dict[str, str]:
        """SHA-256 of each file, by its name, sorted; `progress` hears the share of each file that is done."""
        return {name: files.sha256(path, progress) for name, path in self._paths.items()}

    def sha256(self, progress: Callable[[float], None] | None = None) -> str:
        """SHA-256 of the file; of shards, that over the lines `<sha256>  <file name>`, sorted by name."""
        digests = self.file_digests(progress)
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()

    def same_as(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The tensor that `name` of another checkpoint of this base means: the longest end of it that is a name here.

        A task's model or PEFT puts a prefix in front of the base's own names (`bert.`, `base_model.model.`). None when
        no tensor of that shape answers to it.
        """
        parts = name.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            if end in self._home and self.info(end).shape == shape:
                return end
        return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder with `model.safetensors` or an index of shards, or one safetensors file.

    Raises CheckpointInvalid, HeaderInvalid, OSError.
    """
    path = Path(path)
    if path.is_file() and path.name != INDEX_FILE:
        return Checkpoint({path.name: path})
    folder = path.parent if path.is_file() else path
    if (folder / INDEX_FILE).is_file():
        return Checkpoint(_shards(folder))
    if (folder / WEIGHTS_FILE).is_file():
        return Checkpoint({WEIGHTS_FILE: folder / WEIGHTS_FILE})
    raise _invalid(f"There is no checkpoint in {path.name}.", path.name, "neither file",
                   f"{WEIGHTS_FILE} or {INDEX_FILE}")  # fmt: skip


def _shards(folder: Path) -> dict[str, Path]:
    """The files that an index names; all must lie in the folder itself."""
    index = folder / INDEX_FILE
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise _invalid("The index is too large.", INDEX_FILE, f"{index.stat().st_size} bytes", str(_MAX_INDEX_BYTES))
    try:
        record = strict.loads(index.read_bytes(), max_keys=_MAX_INDEX_KEYS, max_depth=4)
    except strict.Malformed as error:
        raise _invalid("The index is not strict JSON.", INDEX_FILE, str(error), "an index of shards") from error
    places = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise _invalid("The index has no weight_map.", INDEX_FILE, type(places).__name__, "tensor names to file names")
    found = {}
    for name in sorted(set(places.values())):
        if "/" in name or "\\" in name or not (folder / name).is_file():
            raise _invalid("The index names a file that is not there.", INDEX_FILE, ascii(name)[:120],
                           "a file beside the index")  # fmt: skip
        found[name] = folder / name
    return found


def _invalid(detail: str, pointer: str, met: str, wanted: str) -> CheckpointInvalid:
    return CheckpointInvalid(detail, pointer=pointer, met=met, wanted=wanted, remedy=_SAVE_AGAIN)
