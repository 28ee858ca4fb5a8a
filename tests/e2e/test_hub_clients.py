"""Stock clients, unmodified, with nothing but HF_ENDPOINT and HF_TOKEN, against the hub as `bin/run` starts it."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests import tiny
from tests.e2e import breaking
from tests.hubs import Hub

SCRIPTS = Path(__file__).parent / "scripts"
INSTALLED = "2.4.0"
OTHERS = ("0.20.3", "0.26.5", "0.36.2", "1.5.0")


def run(python: str | Path, script: str, *arguments: object, hub: Hub, home: Path, url: str = "") -> dict:
    """A script in a process of its own, with a fresh cache; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_", "DJANGO_"))}
    mine = {"HF_ENDPOINT": url or hub.url, "HF_TOKEN": hub.api_key, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), str(SCRIPTS / script), *map(str, arguments)],
        env={**kept, **mine, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as training leaves it: the adapter, and what does not belong to it."""
    folder = tiny.write(tiny.lora(seed=3, rank=8, modules=(tiny.QUERY, tiny.VALUE)), tmp_path / "adapter")
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04 a pickle inside")
    return folder


def check_journey(python: str | Path, version: str, adapter: Path, hub: Hub, work: Path) -> None:
    seen = run(python, "hub_client.py", hub.username, adapter, hub=hub, home=work / "home")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    own = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    repo = f"{hub.username}/client-{version.replace('.', '-')}"
    assert seen["version"] == version
    assert seen["whoami"] == hub.username
    assert seen["url"] == seen["url again"] == f"{hub.url}/{repo}"
    assert seen["empty tree"] == []
    assert seen["commits are one"]
    assert seen["files"] == [*own, "notes/first note.md"]
    assert seen["sizes"]["adapter_model.safetensors"] == len(weights)
    assert seen["sha256"] == hashlib.sha256(weights).hexdigest()
    assert seen["private"] is False
    assert "peft" in seen["tags"]
    assert seen["listed"] == [repo]
    assert seen["exists"] == [True, False, False]
    assert seen["snapshot is the folder"]
    assert seen["leftover was left out"]
    assert seen["snapshot is the commit"]
    assert len(seen["titles"]) == 2
    assert seen["titles"][1] == "The adapter"
    assert (seen["branches"], seen["tags made"]) == (["dev", "main"], ["v1"])
    assert seen["files of v1"] == seen["files after delete"] == own
    assert seen["files by long names"] == [own, own]
    assert seen["deleted file of its commit"] == "Notes of the tests.\n"
    assert seen["raised"] == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "EntryNotFoundError",
        "RepositoryNotFoundError",
    ]
    assert seen["after delete"] == "RepositoryNotFoundError"
    assert seen["listed after delete"] == []


def test_the_installed_huggingface_hub_uploads_reads_and_deletes(hub: Hub, adapter: Path, tmp_path: Path):
    check_journey(sys.executable, INSTALLED, adapter, hub, tmp_path)


def test_stock_peft_loads_an_expert_by_branch_and_by_commit(hub: Hub, adapter: Path, tmp_path: Path):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.api_key)
    repo = f"{hub.username}/for-peft"
    api.create_repo(repo, private=True)
    commit = api.upload_folder(repo_id=repo, folder_path=adapter).oid
    seen = run(sys.executable, "peft_client.py", repo, adapter, "main", commit, hub=hub, home=tmp_path / "home")
    assert seen["effect"] > 0.01
    assert seen["difference"] == {"main": 0.0, commit: 0.0}
    api.delete_repo(repo)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub, adapter: Path, tmp_path: Path):
    from huggingface_hub import HfApi
    from safetensors.numpy import save_file

    # The client keeps what it has in steps of ten megabytes.
    noise = np.random.default_rng(1).normal(size=(5_000, 1_000)).astype(np.float32)
    save_file({"noise": noise}, adapter / "noise.safetensors")
    data = (adapter / "noise.safetensors").read_bytes()
    api = HfApi(endpoint=hub.url, token=hub.api_key)
    repo = f"{hub.username}/large"
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=adapter)
    with breaking.way_to(hub.url, cut_after_bytes=12_000_000) as (url, record):
        seen = run(
            sys.executable, "one_download.py", repo, "noise.safetensors", hub=hub, home=tmp_path / "home", url=url
        )
    assert record.is_cut
    assert record.ranges[-1] in {"bytes=10485760-", "bytes=10000000-", "bytes=12000000-"}
    assert seen == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    api.delete_repo(repo)


def test_stock_peft_loads_a_merge_by_the_name_of_a_parent_while_it_is_still_computed(hub: Hub, tmp_path: Path):
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(endpoint=hub.url, token=hub.api_key)
    for seed, name in enumerate(("half-a", "half-b"), start=1):
        folder = tiny.write(tiny.lora(seed=seed, rank=4 * seed), tmp_path / name)
        # Private, so that routing over the demo experts does not see them.
        api.create_repo(f"{hub.username}/{name}", private=True)
        api.upload_folder(repo_id=f"{hub.username}/{name}", folder_path=folder)
        wait_until_ready(hub, f"{hub.username}/{name}")
    experts = [{"expert": f"{hub.username}/half-{half}", "weight": weight} for half, weight in (("a", 0.7), ("b", 0.3))]
    body = {"base_model": tiny.BASE, "method": "linear", "parameters": {}, "experts": experts}
    merge = httpx.post(f"{hub.url}/api/v1/merges", json=body, headers=hub.headers).json()
    # The client waits for the worker by itself: it is told 503 with Retry-After until the files are there.
    folder = snapshot_download(
        merge["repo"], endpoint=hub.url, token=hub.api_key, cache_dir=tmp_path / "cache", local_dir=tmp_path / "merged"
    )
    names = (f"merge--{merge['id']}", merge["commit"])
    seen = run(
        sys.executable, "peft_client.py", f"{hub.username}/half-a", folder, *names, hub=hub, home=tmp_path / "home"
    )
    assert seen["effect"] > 0.01
    assert seen["difference"] == dict.fromkeys(names, 0.0)
    for half in ("half-a", "half-b"):
        api.delete_repo(f"{hub.username}/{half}")


def wait_until_ready(hub: Hub, full_name: str) -> None:
    for _ in range(240):
        record = httpx.get(f"{hub.url}/api/v1/experts/{full_name}", headers=hub.headers).json()
        if record["state"] != "processing":
            break
        time.sleep(0.5)
    assert record["state"] == "ready", record


@pytest.fixture
def half_sent(hub: Hub) -> Iterator[tuple[str, bytes]]:
    """The address of commits to an empty repository, and the body of a commit of two files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.api_key)
    repo = f"{hub.username}/half-sent"
    api.create_repo(repo)
    files = [{"path": name, "content": "YQ==", "encoding": "base64"} for name in ("a.txt", "b.txt")]
    lines = [{"key": "header", "value": {"summary": "Two files"}}, *({"key": "file", "value": file} for file in files)]
    yield f"/api/models/{repo}/commit/main", b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    api.delete_repo(repo)


def test_a_commit_that_is_cut_off_after_a_whole_line_is_not_taken_for_a_smaller_one(hub: Hub, half_sent):
    address, body = half_sent
    place = urlsplit(hub.url)
    short = body[: body.rstrip().rindex(b"\n") + 1]
    with socket.create_connection((place.hostname, place.port), timeout=30) as there:
        head = f"POST {address} HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {hub.api_key}\r\n"
        there.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + short)
        there.shutdown(socket.SHUT_WR)
        answer = there.recv(65536)
    assert b" 200 " not in answer.splitlines()[0] if answer else True
    assert httpx.get(f"{hub.url}{address.replace('/commit/', '/tree/')}", headers=hub.headers).json() == []


def test_a_commit_may_come_in_chunks_without_a_length(hub: Hub, half_sent):
    address, body = half_sent
    parts = (body[place : place + 7] for place in range(0, len(body), 7))
    assert httpx.post(f"{hub.url}{address}", content=parts, headers=hub.headers).status_code == 200
    tree = httpx.get(f"{hub.url}{address.replace('/commit/', '/tree/')}", headers=hub.headers).json()
    assert [(row["path"], row["size"]) for row in tree] == [("a.txt", 1), ("b.txt", 1)]


@pytest.mark.clients
@pytest.mark.parametrize("version", [*OTHERS, INSTALLED])
def test_every_version_in_use_makes_the_whole_journey(hub: Hub, adapter: Path, tmp_path: Path, version: str):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    packages = [f"huggingface_hub=={version}"]
    subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *packages], check=True)
    check_journey(python, version, adapter, hub, tmp_path)
