"""The files of a merged checkpoint: set aside whole, then filled tensor by tensor, and taken back on failure."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moerge.merging.full_checkpoints.plan import Plan
from moerge.tensors import checkpoints, files
from moerge.tensors.header import ITEM_BYTES

_READ_BYTES = 1 << 20


class Files:
    """The files of a merge, cut as the reference is, with the room of every tensor set aside before the first one."""

    def __init__(self, plan: Plan, dtypes: Mapping[str, str], out: Path) -> None:
        homes: dict[str, list[str]] = {}
        for name in plan.reference.checkpoint.names:
            homes.setdefault(plan.reference.checkpoint.file_of(name).path.name, []).append(name)
        self.places = {file if len(homes) > 1 else checkpoints.WEIGHTS_FILE: names for file, names in homes.items()}
        self.total = sum(plan.size(name) * ITEM_BYTES[dtypes[name]] for name in dtypes)
        self._out = out
        self._homes: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        try:
            for file, names in self.places.items():
                self._set_aside(file, {name: (dtypes[name], plan.shape(name)) for name in names})
        except BaseException:
            self.discard()
            raise

    def _set_aside(self, file: str, claims: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        head, starts = files.plan(claims, {"format": "pt"})
        descriptor = os.open(self._out / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._descriptors.append(descriptor)
        # A disk that is too small is met now and not after hours.
        size = len(head) + sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in claims.values())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        self._homes.update({name: (descriptor, start) for name, start in starts.items()})
        _pwrite(descriptor, head, 0)

    def put(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write one tensor to its place."""
        descriptor, at = self._homes[name]
        for block in blocks:
            _pwrite(descriptor, block, at)
            at += len(block)

    def stored(self, name: str, count: int) -> Iterator[bytes]:
        """The bytes of a tensor of `count` bytes that was put before."""
        descriptor, at = self._homes[name]
        end = at + count
        while at < end:
            block = os.pread(descriptor, min(end - at, _READ_BYTES), at)
            yield block
            at += len(block)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def write_index(self) -> None:
        """The index of shards, where there are several."""
        if len(self.places) > 1:
            homes = {name: file for file, names in self.places.items() for name in names}
            record = {"metadata": {"total_size": self.total}, "weight_map": homes}
            text = json.dumps(record, indent=2, sort_keys=True) + "\n"
            (self._out / checkpoints.INDEX_FILE).write_text(text, encoding="utf-8")

    def discard(self) -> None:
        """Take back what was written."""
        self.close()
        for file in (*self.places, checkpoints.INDEX_FILE):
            (self._out / file).unlink(missing_ok=True)


def _pwrite(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
