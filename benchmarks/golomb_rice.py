"""Golomb-Rice coding of gaps, by which ComPEFT's authors compute sizes: quotients in unary, remainders in bits.

Quotients and remainders lie in two streams, which costs nothing and lets numpy code both without a loop.
"""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def encode(gaps: Integers) -> bytes:
    """Gaps from 0 as bytes: eight of their count, one of the parameter, eight of the unary bytes, the two streams."""
    bits = parameter(gaps)
    quotients = gaps >> bits
    unary = np.ones(int(quotients.sum()) + gaps.size, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 0
    rest = (gaps[:, None] >> np.arange(bits)) & 1
    first, second = np.packbits(unary).tobytes(), np.packbits(rest.astype(np.uint8).reshape(-1)).tobytes()
    head = gaps.size.to_bytes(8, "little") + bytes([bits]) + len(first).to_bytes(8, "little")
    return head + first + second


def decode(data: bytes) -> Integers:
    """The gaps of `encode`."""
    count, bits = int.from_bytes(data[:8], "little"), data[8]
    end = 17 + int.from_bytes(data[9:17], "little")
    unary = np.unpackbits(np.frombuffer(data[17:end], np.uint8))
    gaps = np.diff(np.flatnonzero(unary == 0)[:count], prepend=-1) - 1 << bits
    if bits:
        rest = np.unpackbits(np.frombuffer(data[end:], np.uint8), count=count * bits).reshape(count, bits)
        gaps += rest.astype(np.int64) @ (1 << np.arange(bits))
    return gaps


def parameter(gaps: Integers) -> int:
    """The number of remainder bits that makes the code shortest."""
    return min(range(20), key=lambda bits: int((gaps >> bits).sum()) + (1 + bits) * gaps.size)
