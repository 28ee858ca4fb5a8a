"""Size, speed and memory of the ComPEFT codec, beside the Shannon bound, zstd, Golomb-Rice and a plain read."""

import argparse
import io
import json
import lzma
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from benchmarks import golomb_rice
from moerge.compression import compress_adapter, planes
from moerge.compression.codecs import compeft
from moerge.compression.ternary import Ternary
from moerge.compression.writer import Writer
from moerge.tensors import files
from moerge.tensors.files import BF16

NAME = "codec"
GOLOMB_RICE = "Golomb-Rice"
SUMMARY = "ComPEFT files: size against Shannon, encode and decode rates, peak memory"

DENSITIES = (0.05, 0.1, 0.2, 0.5)
FILE_TARGETS = {0.05: 29_300, 0.1: 48_600, 0.2: 78_200}
EXCESS_TARGETS = {0.05: 0.9, 0.1: 0.9, 0.2: 0.9, 0.5: 0.1}
DECODE_TARGETS = {0.05: 1.4, 0.1: 1.4, 0.2: 0.9}
ENCODE_TARGETS = {0.05: 0.7, 0.1: 0.5, 0.2: 0.3}
MEMORY_TARGET = 32 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--values", type=int, default=10**7, help="values of the large tensor (default: 10,000,000)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="times each step is run; the fastest counts (default: 5)"
    )
    parser.add_argument("--adapter", type=Path, help="an adapter folder to compress too")
    parser.add_argument(
        "--large", action="store_true", help="also an adapter of 1.6 GB, in processes of its own (two minutes)"
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report. Rates are in bytes of decoded bfloat16 per second of CPU time."""
    if arguments.values < 1000 or arguments.repeats < 1:
        raise ValueError("wanted at least 1,000 values and one repeat")
    rows = adapter_rows()
    plain = plain_read_rate(arguments)
    for density in DENSITIES:
        say(f"{arguments.values:,} values at density {density:.0%}")
        rows += large_rows(arguments, density, plain)
    rows += compress_rows(arguments)
    if arguments.adapter:
        rows += real_rows(arguments.adapter)
    if arguments.large:
        rows += big_rows()
    return rows


def adapter_rows() -> list[dict[str, Any]]:
    """Whole files of a rank 16 adapter of the MiniLM encoder: 72 tensors, 663,552 values, all metadata included."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(6):
        for module in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                       "intermediate.dense", "output.dense"):  # fmt: skip
            width = 1536 if module == "output.dense" else 384
            height = 1536 if module == "intermediate.dense" else 384
            name = f"base_model.model.encoder.layer.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = bf16(rng.normal(0, 0.026, (16, width)))
            tensors[f"{name}.lora_B.weight"] = bf16(rng.normal(0, 0.008, (height, 16)))
    count = sum(tensor.bits.size for tensor in tensors.values())
    metadata = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "source_sha256": "0" * 64}
    rows = []
    for density, target in FILE_TARGETS.items():
        size = len(compeft.encode(tensors, {"density": density}, metadata=metadata))
        shannon = count * shannon_bits(density) / 8
        rows.append(
            row(f"file of {len(tensors)} Gaussian tensors, {count:,} values, k={density:.0%}", size, "bytes",
                peer="Shannon", peer_value=round(shannon), target=target, met=size <= target)
        )  # fmt: skip
    return rows


def large_rows(arguments: argparse.Namespace, density: float, plain: float) -> list[dict[str, Any]]:
    """One tensor of independent values: size, rates, memory."""
    rng = np.random.default_rng(round(100 * density))
    draw = rng.random(arguments.values)
    trits = np.where(draw < density / 2, -1, np.where(draw < density, 1, 0)).astype(np.int8)
    encode_s, data = fastest(lambda: encode(trits), arguments.repeats)
    decode_s, decoded = fastest(lambda: compeft.decode(data), arguments.repeats)
    check(trits, decoded["x"].bits)
    kept = int(np.count_nonzero(trits))
    bits = 8 * len(data) / trits.size
    shannon = shannon_bits(kept / trits.size)
    gigabytes = 2 * trits.size / 1e9
    suffix = f"k={density:.0%}"
    excess, wanted = 100 * (bits / shannon - 1), EXCESS_TARGETS[density]
    rate, decode_target = gigabytes / decode_s, DECODE_TARGETS.get(density)
    write, encode_target = gigabytes / encode_s, ENCODE_TARGETS.get(density)
    memory = peak_beyond_output(data, 2 * trits.size)
    rows = [
        row(f"bits per value, {suffix}", bits, "bits", peer="Shannon", peer_value=shannon),
        row(f"excess over Shannon, {suffix}", excess, "%", target=wanted, met=excess <= wanted),
        row(f"decode to bf16, {suffix}", rate, "GB/s", peer="plain bf16 read", peer_value=plain, target=decode_target,
            met=None if decode_target is None else rate >= decode_target),
        row(f"encode from trits, {suffix}", write, "GB/s", target=encode_target,
            met=None if encode_target is None else write >= encode_target),
        row(f"decode, peak memory beyond the output, {suffix}", memory, "bytes", target=MEMORY_TARGET,
            met=memory <= MEMORY_TARGET),
    ]  # fmt: skip
    return rows + peer_rows(arguments, trits, suffix, bits=bits, decode_rate=rate, encode_rate=write)


def peer_rows(
    arguments: argparse.Namespace,
    trits: np.ndarray,
    suffix: str,
    *,
    bits: float,
    decode_rate: float,
    encode_rate: float,
) -> list[dict[str, Any]]:
    """Other compressors on the same planes: their size, and the rates at which they alone pack and give back."""
    positions = np.flatnonzero(trits)
    coding = planes.coding_for(positions.size, trits.size)
    plane = planes.pack(positions, trits.size, coding).tobytes()
    gaps = np.diff(positions, prepend=-1) - 1
    signs = planes.pack_signs(trits[positions] < 0).nbytes
    gigabytes = 2 * trits.size / 1e9
    rows = []
    for name, (pack, unpack) in compressors().items():
        given = gaps if name == GOLOMB_RICE else plane
        write_s, packed = fastest(lambda pack=pack, given=given: pack(given), min(2, arguments.repeats))
        read_s, back = fastest(lambda packed=packed, unpack=unpack: unpack(packed), min(3, arguments.repeats))
        if not np.array_equal(back, given) if name == GOLOMB_RICE else back != given:
            raise ValueError(f"{name} did not give back what it was given")
        peer_bits = 8 * (len(packed) + signs) / trits.size
        rows += [
            row(f"bits per value, {suffix}, against {name}", bits, "bits", peer=name, peer_value=peer_bits),
            row(f"decode to bf16, {suffix}, against {name} giving back planes alone", decode_rate, "GB/s", peer=name,
                peer_value=gigabytes / read_s),
            row(f"encode from trits, {suffix}, against {name} packing planes alone", encode_rate, "GB/s", peer=name,
                peer_value=gigabytes / write_s),
        ]  # fmt: skip
    return rows


def compressors() -> dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]]:
    found: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {}
    for level in (1, 3):
        packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        found[f"zstd {level}"] = (packer.compress, unpacker.decompress)
    found[GOLOMB_RICE] = (golomb_rice.encode, golomb_rice.decode)
    found["zlib 6"] = (lambda data: zlib.compress(data, 6), zlib.decompress)
    found["xz 1"] = (lambda data: lzma.compress(data, preset=1), lzma.decompress)
    return found


def big_rows() -> list[dict[str, Any]]:
    """The largest adapter people have: rank 64 on 65 B parameters, 1.6 GB in bfloat16."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        say("making an adapter of 1.6 GB")
        size = large_step(place, "make")["bytes"]
        for density in (0.05, 0.2):
            say(f"compressing it at density {density:.0%}")
            done = large_step(place, "compress", "--density", str(density))
            back = large_step(place, "decompress")
            limit = 4 * done["largest_tensor_bytes"] + 300e6
            suffix = f"adapter of {size / 1e9:.2f} GB, k={density:.0%}"
            growth = done["growth_bytes"]
            silence = done["longest_silence_s"]
            rows += [
                row(f"memory growth of compressing, {suffix}", growth, "bytes", target=limit, met=growth <= limit),
                row(f"longest time without progress, {suffix}", silence, "s", target=2, met=silence <= 2),
                row(f"compress, {suffix}", size / 1e9 / done["cpu_s"], "GB/s"),
                row(f"whole file, {suffix}", done["bytes"], "bytes", peer="bf16", peer_value=size),
                row(f"check, decode and write, {suffix}", size / 1e9 / back["cpu_s"], "GB/s"),
                row(f"memory growth of decompressing, {suffix}", back["growth_bytes"], "bytes"),
            ]
    return rows


def large_step(place: str, *step: str) -> dict[str, float]:
    """One step in a process of its own, so that its memory is its own too."""
    command = [sys.executable, "-m", "benchmarks.large_adapter", place, *step]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise ValueError(f"{' '.join(step)} failed: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compress_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole way from float32 factors to a file: top-k, scales of the product, planes."""
    rank = 64
    side = max(64, arguments.values // (2 * rank))
    rng = np.random.default_rng(1)
    tensors = {
        "m.lora_A.weight": rng.normal(0, 0.02, (rank, side)).astype(np.float32),
        "m.lora_B.weight": rng.normal(0, 0.01, (side, rank)).astype(np.float32),
    }
    rows = []
    for density in (0.05, 0.2):
        say(f"compressing a pair of {2 * rank * side:,} values at density {density:.0%}")
        seconds, _ = fastest(
            lambda density=density: compeft.encode(tensors, {"density": density}), min(2, arguments.repeats)
        )
        rate = 2 * 2 * rank * side / 1e9 / seconds
        rows.append(row(f"compress a float32 LoRA pair, k={density:.0%}", rate, "GB/s"))
    return rows


def real_rows(folder: Path) -> list[dict[str, Any]]:
    """A real adapter by the preset `default`."""
    rows = []
    config = (folder / "adapter_config.json").read_bytes()
    with tempfile.TemporaryDirectory() as place:
        for density in (0.05, 0.1, 0.2):
            done = compress_adapter(
                config, folder / "adapter_model.safetensors", Path(place) / "x", density=density
            )  # fmt: skip
            shannon = sum(tensor.size * shannon_bits(tensor.kept / tensor.size) for tensor in done.tensors) / 8
            suffix = f"{folder.name}, k={density:.0%}"
            rows += [
                row(f"file of {suffix}", done.bytes, "bytes", peer="Shannon", peer_value=round(shannon)),
                row(f"smaller than bf16, {suffix}", done.ternary_ratio or 0.0, "times"),
                row(f"cosine of B·A, {suffix}", done.product_cosine or 0.0, ""),
            ]
    return rows


def plain_read_rate(arguments: argparse.Namespace) -> float:
    """What decoding competes with: the same values read from a bfloat16 safetensors file in the page cache."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "plain.safetensors"
        files.write(path, {"x": BF16(np.zeros(arguments.values, np.uint16))})

        def read() -> Any:
            with files.open_file(path) as file:
                return file.array("x")

        seconds, _ = fastest(read, arguments.repeats)
    return 2 * arguments.values / 1e9 / seconds


def encode(trits: np.ndarray) -> bytes:
    positions = np.flatnonzero(trits != 0)
    stream = io.BytesIO()
    with Writer() as writer:
        writer.add(
            Ternary(name="x", dtype="BF16", shape=trits.shape, positions=positions, negative=trits[positions] < 0,
                    scale=1.0)
        )  # fmt: skip
        writer.finish(stream, plain={}, metadata={})
    return stream.getvalue()


def check(trits: np.ndarray, bits: np.ndarray) -> None:
    """A rate of wrong values would be worth nothing."""
    if not np.array_equal(files.from_bf16(bits), trits):
        raise ValueError("decoded values differ from the encoded ones")


def peak_beyond_output(data: bytes, output_bytes: int) -> int:
    tracemalloc.start()
    compeft.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return max(0, peak - output_bytes)


def shannon_bits(density: float) -> float:
    """Entropy of one value: H(k) for the position and k for the sign."""
    if density in (0, 1):
        return density
    return -density * log2(density) - (1 - density) * log2(1 - density) + density


def fastest(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least CPU seconds over the repeats, and the last result."""
    seconds, result = float("inf"), None
    for _ in range(repeats):
        result = None
        started = time.process_time()
        result = work()
        seconds = min(seconds, time.process_time() - started)
    return max(seconds, 1e-9), result


def bf16(values: np.ndarray) -> BF16:
    return BF16(files.to_bf16(values.astype(np.float32)))


def row(
    name: str,
    value: float,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    target: float | None = None,
    met: bool | None = None,
) -> dict[str, Any]:
    ratio = value / peer_value if peer_value else None
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
        "peer_value": None if peer_value is None else round(peer_value, 4),
        "ratio": None if ratio is None else round(ratio, 4),
        "target": target,
        "met": met,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
