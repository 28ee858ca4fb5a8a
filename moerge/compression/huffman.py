"""Deflate streams (RFC 1951) of one Huffman block, smaller than zlib's and the same under every build of zlib.

zlib starts a new block, with a new table of code lengths, every 32 K symbols. Gaps of one piece follow one
distribution, so one block suffices; and where the counts fall steadily, as those of gaps do, code lengths from smoothed
counts make a table of a few runs for a handful of longer codes.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_END = 256
_LONGEST, _LONGEST_OF_LENGTHS = 15, 7
_ESCAPE = 255
# The order in which RFC 1951 sends the code lengths of the code-length alphabet.
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


def deflate(piece: bytes) -> bytes:
    """One final block of literals under its own Huffman code; any inflater gives `piece` back."""
    data = np.frombuffer(piece, np.uint8)
    counts = [*np.bincount(data, minlength=_END).tolist(), 1]
    lengths, head = min(
        (_table(candidate) for candidate in (counts, _smooth(counts))),
        key=lambda made: made[1].count + sum(n * length for n, length in zip(counts, made[0], strict=True)),
    )
    return _pack(data, _canonical(lengths), lengths, head)


class _Bits:
    """Bits from the lowest on, as deflate orders them."""

    def __init__(self) -> None:
        self.value = 0
        self.count = 0

    def put(self, value: int, count: int) -> None:
        self.value |= value << self.count
        self.count += count


def _table(counts: Sequence[int]) -> tuple[list[int], _Bits]:
    """Code lengths of the 257 symbols, and the block's head that tells them."""
    lengths = code_lengths(counts, _LONGEST)
    # One distance code of length zero: there are no matches.
    tokens = [*_runs(lengths), (0, 0, 0)]
    seen = [0] * len(_ORDER)
    for symbol, _, _ in tokens:
        seen[symbol] += 1
    inner = code_lengths(seen, _LONGEST_OF_LENGTHS)
    codes = _canonical(inner)
    told = max(4, 1 + max(place for place, symbol in enumerate(_ORDER) if inner[symbol]))
    head = _Bits()
    for value, count in ((1, 1), (2, 2), (len(lengths) - 257, 5), (0, 5), (told - 4, 4)):
        head.put(value, count)
    for symbol in _ORDER[:told]:
        head.put(inner[symbol], 3)
    for symbol, extra, extra_bits in tokens:
        head.put(codes[symbol], inner[symbol])
        head.put(extra, extra_bits)
    return lengths, head


def code_lengths(counts: Sequence[int], longest: int) -> list[int]:
    """Huffman code lengths; 0 for what does not occur. Rare symbols count for more until no code exceeds `longest`."""
    lengths, least = _tree(counts), max(1, sum(counts) >> longest)
    while max(lengths) > longest:
        lengths = _tree([max(count, least) if count else 0 for count in counts])
        least *= 2
    return lengths


def _tree(counts: Sequence[int]) -> list[int]:
    nodes = [(count, symbol) for symbol, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    if len(nodes) == 1:
        lengths[nodes[0][1]] = 1
        return lengths
    heapq.heapify(nodes)
    parents: dict[int, int] = {}
    inner = len(counts)
    while len(nodes) > 1:
        one, other = heapq.heappop(nodes), heapq.heappop(nodes)
        parents[one[1]] = parents[other[1]] = inner
        heapq.heappush(nodes, (one[0] + other[0], inner))
        inner += 1
    depths = {inner - 1: 0}
    for node in range(inner - 2, -1, -1):
        if node in parents:
            depths[node] = depths[parents[node]] + 1
    return [depths.get(symbol, 0) for symbol in range(len(counts))]


def _canonical(lengths: Sequence[int]) -> list[int]:
    """The codes that RFC 1951 derives from code lengths, their first bit lowest."""
    sizes = [0] * (max(lengths) + 1)
    for length in lengths:
        sizes[length] += length > 0
    code, following = 0, [0] * len(sizes)
    for length in range(1, len(sizes)):
        code = (code + sizes[length - 1]) << 1
        following[length] = code
    codes = [0] * len(lengths)
    for symbol, length in enumerate(lengths):
        if length:
            codes[symbol] = int(f"{following[length]:0{length}b}"[::-1], 2)
            following[length] += 1
    return codes


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Code lengths as (symbol, extra bits' value, their count): 16 repeats the last one, 17 and 18 repeat zero."""
    tokens: list[tuple[int, int, int]] = []
    start = 0
    while start < len(lengths):
        value, end = lengths[start], start
        while end < len(lengths) and lengths[end] == value:
            end += 1
        left, start = end - start, end
        if value:
            tokens.append((value, 0, 0))
            left -= 1
        while left >= 3:
            taken = min(left, 6 if value else 138)
            if value:
                tokens.append((16, taken - 3, 2))
            else:
                tokens.append((17, taken - 3, 3) if taken <= 10 else (18, taken - 11, 7))
            left -= taken
        tokens += [(value, 0, 0)] * left
    return tokens


def _smooth(counts: Sequence[int]) -> list[int]:
    """The nearest counts that never rise from gap to gap (pooled adjacent violators), in 64ths; not escape and end."""
    pools: list[tuple[int, int]] = []
    for count in counts[:_ESCAPE]:
        total, size = 64 * count, 1
        while pools and pools[-1][0] * size < total * pools[-1][1]:
            before, width = pools.pop()
            total, size = total + before, size + width
        pools.append((total, size))
    smooth = [total // size for total, size in pools for _ in range(size)]
    # Whatever occurs needs a code, however rare its neighbours are.
    return [max(made, count > 0) for made, count in zip(smooth, counts, strict=False)] + [
        64 * counts[_ESCAPE],
        64 * counts[_END],
    ]


def _pack(data: npt.NDArray[np.uint8], codes: Sequence[int], lengths: Sequence[int], head: _Bits) -> bytes:
    """Head, the codes of all bytes, the end of the block.

    Four codes have at most 60 bits, so fours are joined first. In every 64-bit word at least one of them begins, and
    only the last to begin there can reach into the next word.
    """
    whole = data.size - data.size % 4
    joined, bits = _fours(data[:whole], codes, lengths)
    ends = np.cumsum(bits) + head.count
    tail = _Bits()
    for symbol in (*data[whole:].tolist(), _END):
        tail.put(codes[symbol], lengths[symbol])
    begin = int(ends[-1]) if whole else head.count
    out = np.zeros((begin + tail.count) // 64 + 2, "<u8")
    if whole:
        starts = ends - bits
        words, shifts = starts >> 6, (starts & 63).astype(np.uint64)
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        lasts = np.append(firsts[1:], words.size) - 1
        out[words[firsts]] = np.bitwise_or.reduceat(joined << shifts, firsts)
        # Shifted in two steps, for a shift by all 64 bits is undefined.
        out[words[lasts] + 1] |= (joined[lasts] >> np.uint64(1)) >> (np.uint64(63) - shifts[lasts])
    _or_into(out, head.value, 0)
    _or_into(out, tail.value << begin % 64, begin // 64)
    return out.tobytes()[: -(-(begin + tail.count) // 8)]


def _fours(
    data: npt.NDArray[np.uint8], codes: Sequence[int], lengths: Sequence[int]
) -> tuple[UInt64, npt.NDArray[np.int64]]:
    """Codes of each four bytes as one number, and how many bits it has. Pairs are looked up, as 16-bit numbers."""
    code, length = np.array(codes[:_END], np.uint64), np.array(lengths[:_END], np.uint64)
    pair_codes = (code[None, :] | code[:, None] << length[None, :]).reshape(-1).astype(np.uint32)
    pair_lengths = (length[None, :] + length[:, None]).reshape(-1).astype(np.uint8)
    pairs = data.view("<u2")
    found, sizes = pair_codes[pairs].astype(np.uint64), pair_lengths[pairs]
    joined: UInt64 = found[::2] | found[1::2] << sizes[::2].astype(np.uint64)
    return joined, sizes[::2].astype(np.int64) + sizes[1::2]


def _or_into(out: UInt64, value: int, word: int) -> None:
    words = np.frombuffer(value.to_bytes(-(-value.bit_length() // 64) * 8, "little"), "<u8")
    out[word : word + words.size] |= words
