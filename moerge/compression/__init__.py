"""Compression of task vectors: a catalogue of codecs, and adapters in and out. numpy and zlib only."""

from types import ModuleType

from moerge import table
from moerge.compression import codecs
from moerge.compression.adapters import PRESETS, compress, compress_adapter, compress_delta
from moerge.compression.restore import decompress, open_any, verify

__all__ = ["PRESETS", "catalogue", "compress", "compress_adapter", "compress_delta", "decompress", "open_any", "verify"]


def catalogue() -> dict[str, ModuleType]:
    """Every codec (see `moerge.compression.base.Codec`) by name."""
    return table.load(codecs)
