"""An open container: what reading encoded files has in common, whatever the codec."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from moerge.compression import manifest
from moerge.compression.shell import Cursor, Pieces, Shell
from moerge.compression.ternary import as_float32
from moerge.errors import EncodedInvalid
from moerge.tensors import files
from moerge.tensors.files import BF16, Array

Initial = Callable[[str], "Array | BF16"]


class Claim(Protocol):
    """What every entry of a manifest says."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def init(self) -> int | str: ...


E = TypeVar("E", bound=Claim)


class Container(ABC, Generic[E]):
    """A file whose claims have been checked. A context manager.

    `tensor(name)` decodes one tensor from the pieces that cover it; `walk` decodes all and checks the hash at the end.
    """

    entries: Mapping[str, E]
    _pieces: Pieces
    # The plane that is stored as it is and joins the hash last.
    _last_plane: str | None = None

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self.metadata = shell.metadata
        self.plain = shell.plain
        self._manifest = manifest.inflate(shell.read("manifest"))
        self._scales = shell.read("scales")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shell.close()

    @property
    def file_bytes(self) -> int:
        return self._shell.file_bytes

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the file that stand for encoded tensors: manifest, scales and planes."""
        return self._shell.plane_bytes

    def tensor(self, name: str, initial: Initial | None = None) -> Array | BF16:
        """One tensor, without reading the others. Raises KeyError for an unknown name."""
        return self.reader(initial)(name)

    def reader(self, initial: Initial | None = None) -> Callable[[str], Array | BF16]:
        """`tensor` for one thread that asks for many: neighbours in the manifest share what they are decoded from."""
        cursor = Cursor(self._pieces)

        def read(name: str) -> Array | BF16:
            entry = self.entries.get(name)
            return self._shell.plain_tensor(name) if entry is None else self._decode(entry, cursor, initial)

        return read

    def claim(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape that `tensor` will give. Raises KeyError for an unknown name."""
        entry = self.entries.get(name)
        return self._shell.plain_claim(name) if entry is None else (entry.dtype, entry.shape)

    def walk(self, initial: Initial | None = None) -> Iterator[tuple[str, Array | BF16]]:
        """Every encoded tensor in the order of the manifest; raises C7.hash after the last when the hash differs.

        Use nothing of it before it has ended.
        """
        digest = hashlib.sha256(self._manifest + self._scales)
        cursor = Cursor(self._pieces, digest)
        for entry in self.entries.values():
            yield entry.name, self._decode(entry, cursor, initial)
        self._shell.check_hash(digest, self._last_plane)

    def verify(self) -> None:
        """Check rules 5 to 7 over the whole file, decoding nothing."""
        digest = hashlib.sha256(self._manifest + self._scales)
        cursor = Cursor(self._pieces, digest)
        for entry in self.entries.values():
            self._check(entry, cursor)
        self._shell.check_hash(digest, self._last_plane)

    @abstractmethod
    def _decode(self, entry: E, cursor: Cursor, initial: Initial | None) -> Array | BF16:
        """One entry from its range of the pieces, checked by rules 5 and 6."""

    @abstractmethod
    def _check(self, entry: E, cursor: Cursor) -> None:
        """What `_decode` checks."""


def start_of(name: str, dtype: str, shape: tuple[int, ...], initial: Initial | None) -> Array:
    """The base model's tensor in a dtype, a copy; uint16 bits for BF16. Raises EncodedInvalid."""
    if initial is None:
        raise EncodedInvalid(
            f"{name} is a difference from the base model, and no base was given.", pointer=name,
            met="no base model", wanted="the checkpoint it was trained from", remedy="Pass the base checkpoint.",
        )  # fmt: skip
    base = as_float32(initial(name))
    if base.shape != shape:
        raise EncodedInvalid(
            f"The base tensor of {name} has another shape.", pointer=name, met=list(base.shape),
            wanted=list(shape), remedy="Pass the base checkpoint that the metadata names.",
        )  # fmt: skip
    made = files.to_dtype(base, dtype)
    return (made.bits if isinstance(made, BF16) else made).copy()
