"""The weights of a base model: read one tensor at a time, found under the names that adapters use for them."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from moerge.errors import CheckpointInvalid
from moerge.tensors import checkpoints, header
from moerge.tensors.checkpoints import Checkpoint
from moerge.tensors.files import Float32


def digest(folder: str | Path, progress: Callable[[float], None] | None = None) -> str:
    """SHA-256 over the lines `<file name> <sha256>` of a checkpoint's files, sorted by name.

    `progress` hears the share of each file that is done. Raises CheckpointInvalid, HeaderInvalid, OSError.
    """
    with checkpoints.open_checkpoint(folder) as checkpoint:
        return digest_of(checkpoint.file_digests(progress))


def digest_of(sha256s: Mapping[str, str]) -> str:
    """What `digest` is of a checkpoint whose files have these SHA-256, by name."""
    return hashlib.sha256("".join(f"{name} {sha256s[name]}\n" for name in sorted(sha256s)).encode()).hexdigest()


class BaseWeights:
    """A folder with the checkpoint of a base model. A context manager.

    An adapter and its base often name one tensor differently, because a task's model wraps the base in a part of its
    own (`bert.`, `model.`, `transformer.`). So a name means the tensor of exactly that name, else the only one whose
    name differs from it by leading parts that one of both has. Two such tensors mean that none was found.
    """

    def __init__(self, folder: str | Path, digest: str | None = None) -> None:
        """`digest`, where known, spares a reading of all files. Raises CheckpointInvalid, HeaderInvalid, OSError."""
        self.folder = Path(folder)
        self._digest = digest
        self._checkpoint = checkpoints.open_checkpoint(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give all files back."""
        self._checkpoint.close()

    @property
    def checkpoint(self) -> Checkpoint:
        """The tensors under their own names, in their own dtypes."""
        return self._checkpoint

    @cached_property
    def digest(self) -> str:
        """What `digest` of the folder is."""
        return self._digest or digest_of(self._checkpoint.file_digests())

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return self._checkpoint.names

    def find(self, name: str) -> str | None:
        """The name under which the base holds the tensor that an adapter calls `name`; None where that is unclear."""
        if name in self._checkpoint:
            return name
        longer = self._by_end.get(name, ())
        shorter = [end for end in _ends(name) if end in self._checkpoint]
        found = {*longer, *shorter}
        return found.pop() if len(found) == 1 else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, by the name an adapter has for it."""
        found = self.find(name)
        return None if found is None else self._checkpoint.info(found).shape

    def tensor(self, name: str) -> Float32 | None:
        """A tensor as float32, by the name an adapter has for it. Raises CheckpointInvalid for one that is not floats.

        Integers would be those of a quantised base, whose scales lie elsewhere.
        """
        found = self.find(name)
        if found is None:
            return None
        dtype = self._checkpoint.info(found).dtype
        if dtype not in header.WEIGHT_DTYPES:
            raise CheckpointInvalid(
                f"{found} of the base is stored as {dtype}.", pointer=found, met=dtype,
                wanted=" or ".join(sorted(header.WEIGHT_DTYPES)), remedy="Use the base before it was quantised.",
            )  # fmt: skip
        return self._checkpoint.float32(found)

    def weight(self, module: str) -> Float32 | None:
        """The weight of a module as the base stores it, (out, in) for a linear layer."""
        return self.tensor(f"{module}.weight")

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            for end in _ends(name):
                found.setdefault(end, []).append(name)
        return found


def _ends(name: str) -> list[str]:
    """What is left of a name without one or more leading parts: never less than a module and its tensor, and never
    past the number of a layer, because layers are not wrappers.
    """
    parts = name.split(".")
    numbered = next((position for position, part in enumerate(parts) if part.isdecimal()), len(parts))
    return [".".join(parts[cut:]) for cut in range(1, min(numbered, len(parts) - 2) + 1)]
