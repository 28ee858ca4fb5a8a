"""A plain slow decoder of `compeft/1` in Python loops: nothing of ours, no numpy, no checks. The format, spelt out."""

import json
import math
import struct
import zlib

PIECE = 262_144


def shell(data):
    """Metadata and name -> (dtype, shape, bytes) of a safetensors file."""
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (claim["dtype"], claim["shape"], bytes(body[slice(*claim["data_offsets"])]))
        for name, claim in header.items()
    }


def planes(data):
    """Rows of the manifest with scales, the decoded position plane, the sign plane."""
    _, tensors = shell(data)
    rows = json.loads(zlib.decompress(tensors["manifest"][2]))
    scales = [value[0] for value in struct.iter_unpack("<f", tensors["scales"][2])]
    lengths = [value[0] for value in struct.iter_unpack("<q", tensors["pos_len"][2])]
    left = sum(row[4] for row in rows)
    packed, plane = tensors["pos"][2], b""
    for length in lengths:
        piece, packed = packed[:length], packed[length:]
        wanted = min(PIECE, left)
        plane += piece if length == wanted else zlib.decompress(piece, -15)
        left -= wanted
    return rows, scales, plane, tensors["sign"][2]


def positions(plane, coding, size):
    """Kept flat indices of one entry."""
    found = []
    if coding == 0:
        index = -1
        for byte in plane:
            if byte == 255:
                index += 255
            else:
                index += byte + 1
                found.append(index)
        return found
    return [index for index in range(size) if plane[index // 8] >> (index % 8) & 1]


def decode(data, base=None):
    """Name -> (dtype, shape, values as Python floats) of all ternary tensors. `base` maps names to lists of floats."""
    rows, scales, plane, signs = planes(data)
    out = {}
    for (name, dtype, shape, kept, plane_bytes, coding, init), scale in zip(rows, scales, strict=True):
        size = 1
        for side in shape:
            size *= side
        own, plane = plane[:plane_bytes], plane[plane_bytes:]
        own_signs, signs = signs[: (kept + 7) // 8], signs[(kept + 7) // 8 :]
        values = [float(init)] * size if init != "base" else [rounded(value, dtype) for value in base[name]]
        step = rounded(scale, dtype)
        for number, index in enumerate(positions(own, coding, size)):
            negative = own_signs[number // 8] >> (number % 8) & 1
            values[index] = rounded(values[index] + (-step if negative else step), dtype)
        out[name] = (dtype, tuple(shape), values)
    return out


def rounded(value, dtype):
    """A number to the nearest one of the dtype, ties to even."""
    try:
        value = struct.unpack("<f", struct.pack("<f", value))[0]
        if dtype == "F16":
            return struct.unpack("<e", struct.pack("<e", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")
    if dtype == "F32" or not math.isfinite(value):
        return value
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    below, rest = bits >> 16, bits & 0xFFFF
    if rest > 0x8000 or (rest == 0x8000 and below & 1):
        below += 1
    return struct.unpack("<f", struct.pack("<I", below << 16))[0]
