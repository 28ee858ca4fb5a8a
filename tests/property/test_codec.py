"""Whatever the tensors, they come back; whatever the file, it is refused by a rule or means what the format says."""

import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge.compression import selection
from moerge.compression.codecs import compeft
from moerge.compression.rules import RULES
from moerge.errors import EncodedInvalid
from moerge.tensors.files import BF16, to_bf16
from tests.property.codec_fuzzer import BUDGET, assert_means
from tests.unit.compression import reference, samples


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


def fuzz(first, last):
    """Changed files of these seeds, decoded in a process of little memory: counts by rule, and of those read."""
    command = [sys.executable, "-m", "tests.property.codec_fuzzer", str(first), str(last)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_changed_files_are_refused_by_a_rule_or_mean_what_the_format_says():
    met = fuzz(0, 5000)
    assert met.keys() - RULES.keys() <= {"read", "no base was given."}
    # The change that a mutator makes is only worth something when it gets far: most rules are reached, and many files
    # are still read.
    assert met["read"] > 500
    assert len(met) > 25
    assert {"C6.position", "C6.emitted", "C6.popcount", "C5.length", "C4.padding", "C3.plane"} <= met.keys()


@pytest.mark.fuzz
def test_a_hundred_thousand_changed_files():
    met = fuzz(10_000, 110_000)
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
