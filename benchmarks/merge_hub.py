"""Merges on a running hub: many clients at once for one that nobody computed yet, and a file of one that is there.

The clients speak what huggingface_hub speaks (revision, tree, HEAD and GET of every file) and come again as it does
when they are told 503. They run in processes of their own, on the machine of the hub, so all share its processors.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg

from benchmarks import hub
from moerge.tensors import files

EXPERTS, MODULES, RANK, WIDTH = 4, 12, 16, 384
PROCESSES = 4
# Between tries, as huggingface_hub 2.4 waits.
PAUSES_SECONDS = (1, 2, 4, 8, 8)
PROBE_EVERY_SECONDS = 0.02
CLIENTS_NICENESS = 10
HEALTH_TARGET = 3.0
# Queries of one request in the code of the hub, counted by Django itself.
COUNTING = """
import sys, django; django.setup()
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
client = Client()
for path in sys.argv[1:]:
    client.get(path).close()
    with CaptureQueriesContext(connection) as seen:
        answer = client.get(path)
    assert answer.status_code == 200, (path, answer.status_code)
    print(len(seen))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clients", type=int, default=100, help="clients that ask at once for a new merge (default: 100)"
    )
    parser.add_argument("--probes", type=int, default=300, help="requests for each median (default: 300)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts a hub, fills it, and measures both."""
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as folder, hub.running(Path(folder) / "home") as started:
        headers = {"Authorization": f"Bearer {started['api_key']}"}
        with httpx.Client(base_url=started["url"], headers=headers, timeout=120, trust_env=False) as client:
            names = list(_uploaded(client, started["username"], Path(folder)))
            merge = _registered(client, names)
            found = list(_crowd(client, merge, arguments, home=Path(folder) / "home"))
            found += _cached(client, merge, names[0], count=arguments.probes, home=Path(folder) / "home")
    return found


def _uploaded(client: httpx.Client, owner: str, folder: Path) -> Iterator[str]:
    """Experts on the layers of a small encoder, each ready to be merged."""
    for number in range(EXPERTS):
        noise, tensors = np.random.default_rng(number), {}
        for layer in range(MODULES // 2):
            for part in ("query", "value"):
                module = f"base_model.model.encoder.layer.{layer}.attention.self.{part}"
                tensors[f"{module}.lora_A.weight"] = noise.standard_normal((RANK, WIDTH), dtype=np.float32)
                tensors[f"{module}.lora_B.weight"] = noise.standard_normal((WIDTH, RANK), dtype=np.float32) / 50
        place = folder / f"expert-{number}"
        place.mkdir()
        files.write(place / "adapter_model.safetensors", tensors, {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": hub.BASE,
            "r": RANK,
            "lora_alpha": RANK,
            "bias": "none",
        }
        (place / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query", "value"]}))
        hub.upload(client, f"{owner}/expert-{number}", place)
    for number in range(EXPERTS):
        name = f"{owner}/expert-{number}"
        while client.get(f"/api/v1/experts/{name}").raise_for_status().json()["state"] != "ready":
            time.sleep(0.2)
        yield name


def _registered(client: httpx.Client, names: list[str]) -> dict[str, Any]:
    body = {
        "base_model": hub.BASE,
        "method": "ties",
        "parameters": {"density": 0.2},
        "experts": [{"expert": name, "weight": 1 / len(names)} for name in names],
        "start": False,
    }
    return dict(client.post("/api/v1/merges", json=body).raise_for_status().json())


def _crowd(
    client: httpx.Client, merge: dict[str, Any], arguments: argparse.Namespace, *, home: Path
) -> Iterator[dict[str, Any]]:
    """All clients at once, while somebody else looks whether the hub answers."""
    url = str(client.base_url)
    share, extra = divmod(arguments.clients, PROCESSES)
    counts = [share + (number < extra) for number in range(PROCESSES)]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        gate = manager.Barrier(PROCESSES + 1)
        crowd = [pool.submit(_clients, url, merge["repo"], count, gate) for count in counts]
        gate.wait()  # the processes have started and wait
        idle = _probed(client, lambda count: count >= arguments.probes)
        gate.wait()
        meanwhile = _probed(client, lambda _: all(future.done() for future in crowd))
    got = [one for future in crowd for one in _results(future)]
    doors = json.loads((home / "run.json").read_text())["doors"]
    with psycopg.connect(doors["database_url"]) as link:
        jobs = link.execute("select attempt from registry_job where merge_id = %s", [merge["id"]]).fetchall()
    record = client.get(f"/api/v1/merges/{merge['id']}").raise_for_status().json()
    started, finished = (datetime.fromisoformat(record["job"][name]) for name in ("started_at", "finished_at"))
    name = f"{arguments.clients} clients at once for a new merge"
    yield hub.row(f"{name}: jobs", len(jobs), "", target=1, met=len(jobs) == 1 and jobs[0] == (1,))
    results = len({digest for digest, _, _ in got})
    yield hub.row(f"{name}: different results", results, "", target=1, met=results == 1)
    yield hub.row(f"{name}: seconds to the last byte", max(seconds for _, seconds, _ in got), "s")
    yield hub.row(f"{name}: median client", float(np.median([seconds for _, seconds, _ in got])), "s")
    yield hub.row(f"{name}: the computation itself", (finished - started).total_seconds(), "s")
    yield hub.row(f"{name}: told to come again", sum(told for _, _, told in got), "answers")
    before, during = (float(np.percentile(times, 95)) for times in (idle, meanwhile))
    yield hub.row(
        f"{name}: /healthz p95 meanwhile",
        during,
        "ms",
        peer=("idle p95", before),
        target=HEALTH_TARGET,
        met=during < HEALTH_TARGET * before,
    )


def _results(future: "Future[list[tuple[str, float, int]]]") -> list[tuple[str, float, int]]:
    try:
        return future.result()
    except httpx.HTTPError as error:
        raise OSError(f"a client got no merge: {error}") from error


def _probed(client: httpx.Client, is_over: Callable[[int], bool]) -> list[float]:
    """Milliseconds of /healthz, asked again and again; `is_over` is told how often it was."""
    times: list[float] = []
    while not is_over(len(times)):
        started = time.perf_counter()
        client.get("/healthz").raise_for_status()
        times.append(1000 * (time.perf_counter() - started))
        time.sleep(PROBE_EVERY_SECONDS)
    return times


def _clients(url: str, repository: str, count: int, gate: threading.Barrier) -> list[tuple[str, float, int]]:
    """So many clients in threads: digest of all files, seconds, and how often each was told to come again."""
    # Clients have machines of their own; on this one what they compute yields to the hub.
    os.nice(CLIENTS_NICENESS)
    start = threading.Barrier(count + 1)
    got: list[tuple[str, float, int]] = []
    errors: list[httpx.HTTPError] = []

    def download() -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            start.wait()
            try:
                got.append(_download(client, repository))
            except httpx.HTTPError as error:
                errors.append(error)

    threads = [threading.Thread(target=download) for _ in range(count)]
    for thread in threads:
        thread.start()
    gate.wait()
    gate.wait()
    start.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return got


def _download(client: httpx.Client, repository: str) -> tuple[str, float, int]:
    """What `snapshot_download` asks for, file by file."""
    started, told = time.perf_counter(), 0

    def asked(method: str, path: str) -> httpx.Response:
        nonlocal told
        for pause in PAUSES_SECONDS:
            try:
                answer = client.request(method, path)
            except httpx.TransportError:
                # The server gives up connections that were idle for two seconds, at times just when one is used again.
                answer = None
            if answer is not None and answer.status_code != 503:
                return answer.raise_for_status()
            told += answer is not None
            time.sleep(pause)
        return client.request(method, path).raise_for_status()

    commit = asked("GET", f"/api/models/{repository}/revision/main").json()["sha"]
    digest = hashlib.sha256()
    for node in asked("GET", f"/api/models/{repository}/tree/{commit}?recursive=true").json():
        path = f"/{repository}/resolve/{commit}/{node['path']}"
        asked("HEAD", path)
        digest.update(asked("GET", path).content)
    return digest.hexdigest(), time.perf_counter() - started, told


def _cached(
    client: httpx.Client, merge: dict[str, Any], expert: str, *, count: int, home: Path
) -> Iterator[dict[str, Any]]:
    """A file of a merge that is there, beside the same file of an ordinary expert."""
    paths = [f"/{name}/resolve/main/adapter_model.safetensors" for name in (merge["repo"], expert)]
    queries = _queries(paths, home)
    yield hub.row(
        "a file of a merge that is there: queries",
        queries[0],
        "",
        peer=("of an expert", queries[1]),
        target=1,
        met=queries[0] <= 1,
    )
    with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as reader:
        merged, ordinary = (hub.median_ms(lambda path=path: reader.get(path), count) for path in paths)  # type: ignore[misc]
        heads = [hub.median_ms(lambda path=path: reader.head(path), count) for path in paths]  # type: ignore[misc]
    yield hub.row("a file of a merge that is there: GET", merged, "ms", peer=("of an expert", ordinary))
    yield hub.row("a file of a merge that is there: HEAD", heads[0], "ms", peer=("of an expert", heads[1]))


def _queries(paths: list[str], home: Path) -> list[int]:
    """Queries of one anonymous GET of each path, without the count of downloads that an expert has beside."""
    doors = json.loads((home / "run.json").read_text())["doors"]
    known = {"DATABASE_URL": doors["database_url"], "BROKER_URL": doors["broker_url"], "HUB_HOME": str(home)}
    environment = {**os.environ, **known, "DJANGO_SETTINGS_MODULE": "config.settings", "HUB_LOG_LEVEL": "ERROR"}
    environment["HUB_SECRET_KEY"] = json.loads((home / "secrets.json").read_text())["secret_key"]
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *paths],
        env=environment,
        cwd=hub.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(f"the queries could not be counted: {done.stderr[-2000:]}")
    return [int(line) for line in done.stdout.split()]
