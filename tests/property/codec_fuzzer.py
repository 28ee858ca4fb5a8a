"""Changes encoded files where it hurts, recomputes what follows, and decodes them in a process of little memory.

    python -m tests.property.codec_fuzzer FIRST LAST

Prints a JSON object: how many files were refused by which rule, and how many were read and meant what they should.
"""

import json
import random
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from moerge.compression.codecs import compeft
from moerge.compression.manifest import Budget
from moerge.errors import EncodedInvalid
from tests.unit.compression import forge, reference, samples
from tests.unit.compression.forge import Forge

BUDGET = Budget(values=50_000, output_bytes=200_000)
HEADROOM = 64 * 2**20


def assert_means(decoded, expected):
    assert decoded.keys() == expected.keys()
    for name, (dtype, shape, values) in expected.items():
        assert samples.dtype_of(decoded[name]) == dtype
        got = samples.values_of(decoded[name])
        assert got.shape == shape
        assert got.reshape(-1).tolist() == values


def fuzz_samples():
    rng = np.random.default_rng(0)
    kept = np.flatnonzero(rng.random(3000) < 0.01)
    sparse = samples.entry("s", "F32", (30, 100), kept, rng.random(kept.size) < 0.5, 0.5)
    half = np.flatnonzero(rng.random(900) < 0.5)
    dense = samples.entry("t", "BF16", (900,), half, rng.random(half.size) < 0.5, 0.25)
    many = np.flatnonzero(rng.random(2000) < 0.2)
    gaps = samples.entry("u", "F16", (40, 50), many, rng.random(many.size) < 0.5, 2.0, 1)
    return [samples.sample_file(), samples.written([sparse, dense, gaps]), samples.written([gaps])]


def any_integer(pick, near):
    return pick.choice([near + 1, near - 1, 0, 1, 255, 2**31, 2**63, -1, near * 2, pick.randrange(1000)])


def change_row(made, pick, _):
    row = pick.choice(made.rows)
    field = pick.randrange(7)
    if field == 0:
        row[0] = pick.choice(["", "a", "zz", "head", "x\n", "é", 5])
    elif field == 1:
        row[1] = pick.choice(["F32", "F16", "BF16", "F64", None])
    elif field == 2 and row[2]:
        row[2][pick.randrange(len(row[2]))] = any_integer(pick, row[2][0])
    elif field in (3, 4):
        row[field] = any_integer(pick, row[field])
    elif field == 5:
        row[5] = pick.choice([0, 1, 1 - row[5] if row[5] in (0, 1) else 0, 2, "0"])
    elif field == 6:
        row[6] = pick.choice([0, 1, "base", 2, None, [0]])


def change_count_and_plane(made, pick, _):
    """A change that rules 3 and 4 cannot see: the counts of an entry and the planes stay in step."""
    number = pick.randrange(len(made.rows))
    row = made.rows[number]
    start = sum(other[4] for other in made.rows[:number])
    end = start + row[4]
    grow = pick.randrange(3)
    row[3] += grow
    row[4] += grow if row[5] == 0 else 0
    extra = bytes(pick.choice([0, 1, 7, 254, 255]) for _ in range(grow if row[5] == 0 else 0))
    made.plane = made.plane[:end] + extra + made.plane[end:]
    wanted = sum((other[3] + 7) // 8 for other in made.rows)
    made.signs = made.signs[:wanted].ljust(min(wanted, 10_000), b"\0")


def change_plane(made, pick, _):
    plane = bytearray(made.plane)
    for _ in range(pick.randrange(1, 4)):
        plane[pick.randrange(len(plane))] = pick.choice([0, 1, 254, 255, pick.randrange(256)])
    made.plane = bytes(plane)


def change_signs(made, pick, _):
    signs = bytearray(made.signs)
    signs[pick.randrange(len(signs))] ^= 1 << pick.randrange(8)
    made.signs = bytes(signs) + b"\0" * pick.choice([0, 0, 0, 1])


def change_scale(made, pick, _):
    value = struct.unpack("<f", struct.pack("<I", pick.choice([pick.getrandbits(32), 0, 1, 0x7F7FFFFF, 0x7FC00000])))[0]
    made.scales[pick.randrange(len(made.scales))] = value


def change_pieces(made, pick, told):
    piece = forge.squeeze(made.plane)
    told["pieces"] = [
        pick.choice([
            made.plane, piece[:-1], piece + b"\0", zlib.compress(made.plane), bytes(len(piece)), pick.randbytes(len(piece)),
            zlib.compress(made.plane + b"\0", 9, -15), zlib.compress(made.plane[:-1], 9, -15), zlib.compress(made.plane, 1, -15),
        ])
    ]  # fmt: skip


def change_lengths(made, pick, told):
    length = len(forge.squeeze(made.plane))
    told["lengths"] = pick.choice([[], [0], [-1], [length + 1], [length - 1], [length, 1], [2**62], [1, length - 1]])


def change_shell(made, pick, told):
    name = pick.choice(["manifest", "scales", "pos", "pos_len", "sign", "plain/head", "plain/a", "extra"])
    told["tensors"] = {name: pick.choice([None, ("U8", [3], b"abc"), ("F32", [0], b""), ("I64", [1], bytes(8))])}


def change_metadata(made, pick, told):
    made.metadata[pick.choice(["format", "version", "n_params", "planes_sha256"])] = pick.choice(
        ["1", "2", "", "compeft"]
    )
    told["sha256"] = pick.choice([None, None, "", "f" * 64])


CHANGES = [change_row, change_row, change_count_and_plane, change_plane, change_plane, change_signs, change_scale,
           change_pieces, change_lengths, change_shell, change_metadata]  # fmt: skip


def fuzz(seeds):
    """Decode changed files; count how many were refused by which rule, and how many were read."""
    sources = fuzz_samples()
    met = {}
    for seed in seeds:
        pick = random.Random(seed)
        made, told = Forge.of(pick.choice(sources)), {}
        for _ in range(pick.choice([1, 1, 1, 2, 3])):
            pick.choice(CHANGES)(made, pick, told)
        try:
            data = made.build(**told)
        except (struct.error, OverflowError, TypeError):
            continue
        try:
            decoded = compeft.decode(data, budget=BUDGET)
        except EncodedInvalid as error:
            rule = error.rule or error.detail.partition(", and ")[2]
            met[rule] = met.get(rule, 0) + 1
            continue
        expected = reference.decode(data)
        assert_means({name: decoded[name] for name in expected}, expected)
        met["read"] = met.get("read", 0) + 1
    return met


def limit_memory():
    """No more address space than there is now, the output budget and 64 MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + BUDGET.output_bytes + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        bytearray(2 * HEADROOM)
    except MemoryError:
        return
    raise SystemExit("the limit of memory does not hold")


if __name__ == "__main__":
    compeft.decode(samples.sample_file())
    limit_memory()
    sys.stdout.write(json.dumps(fuzz(range(int(sys.argv[1]), int(sys.argv[2])))))
