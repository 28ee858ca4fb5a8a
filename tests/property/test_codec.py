"""Whatever the tensors, they come back; whatever the file, it is refused by a rule or means what the format says."""

import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.compression import selection
from moerge.compression.codecs import compeft
from moerge.compression.manifest import Budget
from moerge.compression.rules import RULES
from moerge.errors import EncodedInvalid
from moerge.tensors.files import BF16, to_bf16
from tests.unit.compression import forge, reference, samples
from tests.unit.compression.forge import Forge

BUDGET = Budget(values=50_000)


@st.composite
def entries(draw):
    """A few ternary tensors of any shape, dtype, density and initial value."""
    made = []
    names = draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9),
            max_size=4,
            unique=True,
        )
    )
    for name in sorted(names):
        shape = tuple(draw(st.lists(st.integers(0, 17), max_size=3)))
        size = int(np.prod(shape))
        kind = draw(st.sampled_from(["few", "some", "all"]))
        if kind == "few":
            kept = sorted(draw(st.sets(st.integers(0, max(0, size - 1)), max_size=min(size, 5))))
        else:
            rng = np.random.default_rng(draw(st.integers(0, 2**32)))
            kept = np.flatnonzero(rng.random(size) < (1.0 if kind == "all" else 0.3)).tolist()
        negative = np.random.default_rng(len(kept)).random(len(kept)) < 0.5
        scale = draw(st.floats(2**-20, 2**15, width=32)) if kept else 0.0
        init = draw(st.sampled_from([0, 0, 1]))
        made.append(
            samples.entry(name, draw(st.sampled_from(["F32", "F16", "BF16"])), shape, kept, negative, scale, init)
        )
    return made


def assert_means(decoded, expected):
    assert decoded.keys() == expected.keys()
    for name, (dtype, shape, values) in expected.items():
        assert samples.dtype_of(decoded[name]) == dtype
        got = samples.values_of(decoded[name])
        assert got.shape == shape
        assert got.reshape(-1).tolist() == values


@settings(max_examples=120, deadline=None, derandomize=True)
@given(entries())
def test_ternary_tensors_come_back_as_the_format_says(made):
    data = samples.written(made)
    decoded = compeft.decode(data)
    assert_means(decoded, reference.decode(data))
    for entry in made:
        expected = np.full(entry.size, float(entry.init))
        step = reference.rounded(entry.scale, entry.dtype)
        for index, negative in zip(entry.positions.tolist(), entry.negative.tolist(), strict=True):
            expected[index] = reference.rounded(entry.init + (-step if negative else step), entry.dtype)
        assert samples.values_of(decoded[entry.name]).reshape(-1).tolist() == expected.tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 6),
    width=st.integers(200, 1500),
    height=st.integers(200, 700),
    density=st.floats(0.001, 1),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    preset=st.sampled_from(["default", "paper"]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_adapters_keep_signs_and_sizes(  # noqa: PLR0917 - what varies
    rank, width, height, density, dtype, preset, ties, seed
):
    tensors = samples.lora(np.random.default_rng(seed), rank=rank, width=width, height=height, modules=("q",))
    if ties:
        tensors = {name: np.round(values, 2) for name, values in tensors.items()}
    if dtype != "F32":
        convert = samples.bf16 if dtype == "BF16" else lambda values: values.astype(np.float16)
        tensors = {name: convert(values) for name, values in tensors.items()}
    parameters = {"density": min(density, 0.99), "preset": preset}
    data = compeft.encode(tensors, parameters)
    assert len(data) <= compeft.size_bound(tensors, parameters)
    decoded = compeft.decode(data)
    for name, tensor in tensors.items():
        before, after = samples.values_of(tensor), samples.values_of(decoded[name])
        if preset == "default" and before.size < selection.SMALLEST:
            assert before.tolist() == after.tolist()
            continue
        kept = after != 0
        np.testing.assert_array_equal(np.sign(after[kept]), np.sign(before[kept]))
        assert np.unique(np.abs(after[kept])).size <= 1
        if kept.any():
            assert np.abs(before[kept]).min() >= np.abs(before[~kept]).max(initial=0)
        if preset == "default" and np.count_nonzero(samples.values_of(decoded[name])):
            wanted = max(1, int(np.floor(before.size * parameters["density"] + 0.5)))
            assert np.count_nonzero(kept) == min(wanted, np.count_nonzero(before))


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


def test_changed_files_are_refused_by_a_rule_or_mean_what_the_format_says():
    met = fuzz(range(5000))
    assert met.keys() - RULES.keys() <= {"read", "no base was given."}
    # The change that a mutator makes is only worth something when it gets far: most rules are reached, and many files
    # are still read.
    assert met["read"] > 500
    assert len(met) > 25
    assert {"C6.position", "C6.emitted", "C6.popcount", "C5.length", "C4.padding", "C3.plane"} <= met.keys()


@pytest.mark.fuzz
def test_a_hundred_thousand_changed_files():
    met = fuzz(range(10_000, 110_000))
    assert met.keys() - RULES.keys() <= {"read", "no base was given."}
    assert met["read"] > 10_000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, 4000))
def test_overwritten_bytes_never_give_anything_but_a_typed_error(noise, at):
    good = samples.sample_file()
    data = good[:at] + noise + good[at + len(noise) :]
    with suppress(EncodedInvalid):
        compeft.decode(data, budget=BUDGET)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_the_nth_smallest_magnitude_is_exact(values, data):
    blocks = [np.array(values[start : start + 7], np.float32) for start in range(0, len(values), 7)]
    rank = data.draw(st.integers(1, len(values)))
    expected = np.sort(np.abs(np.array(values, np.float32)))[rank - 1]
    assert selection.nth_smallest(lambda: blocks, rank) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-4, 4), max_size=40), st.floats(0.01, 1))
def test_kept_values_are_the_largest_and_first(values, density):
    array = np.array(values, np.float32)
    count = min(len(values), max(1, int(np.floor(len(values) * density + 0.5)))) if values else 0
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))[:count]
    assert selection.keep_largest(array, density).tolist() == sorted(index for index in order if values[index])


def test_half_precision_rounds_as_the_reference_does():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=500).astype(np.float32), rng.integers(0, 0x7F000000, 500).astype(np.uint32).view(np.float32)]
    )
    assert isinstance(BF16(to_bf16(values)), BF16)
    for value in values.tolist():
        bits = struct.unpack("<I", struct.pack("<f", reference.rounded(value, "BF16")))[0] >> 16
        assert int(to_bf16(np.array([value], np.float32))[0]) == bits
