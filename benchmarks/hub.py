"""The hub as people meet it: start, upload, download, lists, questions; each beside the bare work it stands on.

Starts a hub of its own in a temporary folder by the command that users type, and stops it at the end. The figures are
wall time over loopback; the peers are measured in the same run, so read the ratios.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from moerge.tensors import files

NAME = "hub"
SUMMARY = "start, upload, download, list and ask over HTTP, beside bare disk and sockets"
ROOT = Path(__file__).parent.parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
CHUNK_BYTES = 8 << 20
WIDTH = 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=64, help="size of the adapter that is sent (default: 64)")
    parser.add_argument("--requests", type=int, default=200, help="small requests of each kind (default: 200)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as folder, running(Path(folder) / "home") as hub:
        headers = {"Authorization": f"Bearer {hub['api_key']}"}
        with httpx.Client(base_url=hub["url"], headers=headers, timeout=120, trust_env=False) as client:
            say = lambda text: print(text, file=sys.stderr)  # noqa: E731
            say("making an adapter")
            path = _adapter(Path(folder), megabytes=arguments.megabytes)
            say("uploading")
            rows = list(_transfers(client, hub["username"], path, Path(folder)))
            say("small requests")
            rows += _small(client, hub["username"], count=arguments.requests)
    return [row("seconds to ready, environment made", hub["seconds"], "s"), *rows]


@contextmanager
def running(home: Path) -> Iterator[dict[str, Any]]:
    command = [str(ROOT / "bin" / "run"), "--home", str(home)]
    started = time.monotonic()
    done = subprocess.run([*command, "--detach", "--port", "0"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the hub did not start: {done.stderr.strip()}")
    try:
        yield {**json.loads(done.stdout), "seconds": time.monotonic() - started}
    finally:
        subprocess.run([*command, "--stop"], capture_output=True, check=False)


def _adapter(folder: Path, *, megabytes: int) -> Path:
    """A LoRA on one square layer, as large as wanted by its rank."""
    rank = max(1, megabytes * 10**6 // (2 * 4 * WIDTH))
    noise = np.random.default_rng(0)
    name = "base_model.model.encoder.layer.0.attention.self.query"
    tensors = {
        f"{name}.lora_A.weight": noise.standard_normal((rank, WIDTH), dtype=np.float32),
        f"{name}.lora_B.weight": noise.standard_normal((WIDTH, rank), dtype=np.float32),
    }
    made = folder / "adapter"
    made.mkdir()
    files.write(made / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": rank, "lora_alpha": rank, "bias": "none"}
    (made / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query"]}))
    return made


def _transfers(client: httpx.Client, owner: str, folder: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    megabytes = len(weights) / 1e6
    bare = megabytes / _seconds(lambda: _write_and_hash(weights, scratch / "copy"))
    loopback = megabytes / _seconds(lambda: _through_socket(weights))
    sent = megabytes / _seconds(lambda: upload(client, f"{owner}/bench", folder))
    yield row("upload, checks and commit included", sent, "MB/s", peer=("write + sha256 of the same bytes", bare))
    got: list[int] = []
    address = f"/{owner}/bench/resolve/main/adapter_model.safetensors"
    taken = megabytes / _seconds(lambda: got.append(len(client.get(address).content)))
    if got != [len(weights)]:
        raise ValueError(f"the download has {got} bytes, wanted {len(weights)}")
    yield row("download", taken, "MB/s", peer=("the same bytes through a bare socket", loopback))


def upload(client: httpx.Client, expert: str, folder: Path) -> None:
    paths = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    claims = [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in paths.items()
    ]
    upload = client.post("/api/v1/uploads", json={"expert": expert, "files": claims}).raise_for_status().json()
    for row in upload["files"]:
        data = paths[row["path"]]
        for start in range(row["offset"], len(data), CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, len(data))
            place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            client.put(row["url"], content=data[start:stop], headers=place).raise_for_status()
    client.post(f"/api/v1/uploads/{upload['id']}/complete").raise_for_status()


def _small(client: httpx.Client, owner: str, *, count: int) -> list[dict[str, Any]]:
    """Medians of small requests on one kept-alive connection, beside one that asks nothing of the database."""
    idle = median_ms(lambda: client.get("/healthz"), count)
    asked = iter(range(10**9))
    question = lambda: client.post("/api/v1/route", json={"text": f"is my flight {next(asked)} on time"})  # noqa: E731
    kinds: list[tuple[str, Callable[[], httpx.Response]]] = [
        ("list experts", lambda: client.get("/api/v1/experts")),
        ("read an expert", lambda: client.get(f"/api/v1/experts/{owner}/bench")),
        ("HEAD of a file", lambda: client.head(f"/{owner}/bench/resolve/main/adapter_config.json")),
        ("route a new question, encoding included", question),
    ]
    return [row(name, median_ms(call, count), "ms", peer=("/healthz", idle)) for name, call in kinds]


def median_ms(call: Callable[[], httpx.Response], count: int) -> float:
    call().raise_for_status()
    return 1000 * statistics.median(_seconds(lambda: call().raise_for_status()) for _ in range(count))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write_and_hash(data: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(data).hexdigest()


def _through_socket(data: bytes) -> None:
    """Send bytes over loopback TCP to a reader that keeps them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: _send(server, data))
        thread.start()
        with socket.create_connection(server.getsockname()) as reader:
            kept = bytearray()
            while piece := reader.recv(1 << 18):
                kept += piece
        thread.join()


def _send(server: socket.socket, data: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(data)


def row(
    name: str,
    value: float,
    unit: str,
    *,
    peer: tuple[str, float] | None = None,
    target: float | None = None,
    met: bool | None = None,
) -> dict[str, Any]:
    """A row of the report, with the ratio to a peer of the same run."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "peer": peer[0] if peer else None,
        "peer_value": peer[1] if peer else None,
        "ratio": value / peer[1] if peer else None,
        "target": target,
        "met": met,
    }
