"""Compression of task vectors: a catalogue of codecs, and adapters in and out. numpy and zlib only."""

from types import ModuleType

from moerge import table
from moerge.compression import codecs
from moerge.compression.adapters import compress_adapter, decompress

__all__ = ["catalogue", "compress_adapter", "decompress"]


def catalogue() -> dict[str, ModuleType]:
    """Every codec (see `moerge.compression.base.Codec`) by name."""
    return table.load(codecs)
