"""Takes `compeft/1` files apart and puts changed ones together again, with all that follows from a change recomputed.

What a forger recomputes: the deflated manifest, piece lengths, the header with its offsets, the hash. So a changed file
differs from a true one only in what the test wants to differ.
"""

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field

from tests.unit.compression import reference

PIECE = reference.PIECE


@dataclass
class Forge:
    """Everything a file says, in the open."""

    metadata: dict
    rows: list
    scales: list
    plane: bytes
    signs: bytes
    plain: dict = field(default_factory=dict)

    @classmethod
    def of(cls, data):
        metadata, tensors = reference.shell(data)
        rows, scales, plane, signs = reference.planes(data)
        plain = {name: tensor for name, tensor in tensors.items() if name.startswith("plain/")}
        return cls(metadata, rows, scales, plane, signs, plain)

    def build(
        self, *, text=None, manifest=None, scales=None, pieces=None, lengths=None, sha256=None, tensors=None, **header
    ):
        """The file. Each argument takes the place of what would follow from the rest."""
        text = json.dumps(self.rows, separators=(",", ":"), ensure_ascii=False).encode() if text is None else text
        manifest = zlib.compress(text, 9) if manifest is None else manifest
        scales = struct.pack(f"<{len(self.scales)}f", *self.scales) if scales is None else scales
        if pieces is None:
            pieces = [squeeze(self.plane[at : at + PIECE]) for at in range(0, len(self.plane), PIECE)]
        lengths = [len(piece) for piece in pieces] if lengths is None else lengths
        if sha256 is None:
            sha256 = hashlib.sha256(text + scales + self.plane + self.signs).hexdigest()
        pos = b"".join(pieces)
        found = {
            "pos_len": ["I64", [len(lengths)], struct.pack(f"<{len(lengths)}q", *lengths)],
            "scales": ["F32", [len(scales) // 4], scales],
            "manifest": ["U8", [len(manifest)], manifest],
            "pos": ["U8", [len(pos)], pos],
            "sign": ["U8", [len(self.signs)], self.signs],
        }
        found |= {name: list(tensor) for name, tensor in self.plain.items()}
        found |= tensors or {}
        return shell({**self.metadata, "planes_sha256": sha256 or None}, found, **header)


def squeeze(piece):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = packer.compress(piece) + packer.flush()
    return packed if len(packed) < len(piece) else piece


def shell(metadata, tensors, *, length=None, gap=0):
    """A safetensors file of name -> (dtype, shape, bytes); a tensor of None is left out."""
    header, body = {"__metadata__": {k: v for k, v in metadata.items() if v is not None}}, b"\0" * gap
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype, shape, data = tensor
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
