"""Safetensors bytes made by hand, so that they can be wrong in exactly one way."""

import json
from typing import Any


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def dump(header: Any, data: bytes = b"\0" * 4, *, length: int | None = None) -> bytes:
    """Length, header and data; a header may be JSON text or bytes, `length` may lie."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
