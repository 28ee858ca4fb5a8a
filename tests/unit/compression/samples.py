"""Small tensors and files for the tests of compression."""

import io

import numpy as np

from moerge.compression.ternary import Ternary
from moerge.compression.writer import Writer
from moerge.tensors.files import BF16, from_bf16, to_bf16


def lora(rng, *, rank=8, width=200, height=160, modules=("q", "v"), a=0.05, b=0.01):
    """float32 LoRA factors under the names of PEFT, B smaller than A."""
    out = {}
    for module in modules:
        out[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, a, (rank, width)).astype(np.float32)
        out[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, b, (height, rank)).astype(np.float32)
    return out


def bf16(values):
    return BF16(to_bf16(values))


def values_of(tensor):
    """Any decoded tensor as float32."""
    return from_bf16(tensor.bits) if isinstance(tensor, BF16) else np.asarray(tensor, np.float32)


def dtype_of(tensor):
    return "BF16" if isinstance(tensor, BF16) else {"<f4": "F32", "<f2": "F16", "<f8": "F64"}[tensor.dtype.str]


def entry(name, dtype, shape, positions, negative, scale, init=0):  # noqa: PLR0917 - a row of a table
    return Ternary(
        name=name, dtype=dtype, shape=shape, positions=np.array(positions, np.int64),
        negative=np.array(negative, bool), scale=scale, init=init,
    )  # fmt: skip


def written(entries, plain=None, metadata=None):
    stream = io.BytesIO()
    with Writer() as writer:
        for one in entries:
            writer.add(one)
        writer.finish(stream, plain=plain or {}, metadata=metadata or {})
    return stream.getvalue()


def sample_file():
    """Four entries: gaps with an escape, a mask in half precision, one that keeps nothing, one from an initial 1."""
    return written(
        [
            entry("a", "F32", (4, 200), [0, 3, 4, 300, 799], [True, False, True, False, False], 0.5),
            entry("b", "BF16", (3, 7), [0, 1, 2, 5, 8, 9, 11, 16, 20], [i % 2 == 0 for i in range(9)], 0.3),
            entry("c", "F16", (5,), [], [], 0.0),
            entry("d", "F16", (2, 3, 2), [1, 11], [False, True], 0.25, init=1),
        ],
        plain={"head": np.arange(6, dtype=np.float32).reshape(2, 3)},
        metadata={"preset": "default", "base_model": "tiny"},
    )
