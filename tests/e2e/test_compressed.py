"""The compressed expert on a running hub: asked for, waited for, fetched, and loaded by clients that know nothing of it."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.e2e.test_hub_clients import run
from tests.hubs import Hub
from tests.unit.compression import reference
from tests.uploader import Uploader

FILES = tiny.lora(seed=11, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE))


@pytest.fixture(scope="module")
def expert(hub: Hub) -> Iterator[str]:
    """A ready expert of the administrator, removed afterwards so that routing over the demo experts stays as it is."""
    name = f"{hub.username}/for-compression"
    uploader = Uploader(hub.url, hub.api_key)
    uploader.upload(name, FILES)
    uploader.until(f"/api/v1/experts/{name}", lambda record: record.get("state") == "ready", seconds=120)
    yield name
    uploader.client.delete(f"/api/v1/experts/{name}")
    uploader.close()


def fetched(hub: Hub, address: str, *, seconds: float = 60) -> tuple[httpx.Response, int]:
    """What an address without a key gives in the end, and how often it was told to come again."""
    told = 0
    deadline = time.monotonic() + seconds
    while True:
        answer = httpx.get(f"{hub.url}{address}", timeout=30)
        if answer.status_code != 503 or time.monotonic() > deadline:
            return answer, told
        told += 1
        assert httpx.get(f"{hub.url}{answer.json()['job_url']}").json()["id"] == answer.json()["job"]
        time.sleep(min(float(answer.headers["Retry-After"]), 2))


def decoded(data: bytes) -> dict[str, np.ndarray]:
    """By the plain decoder that shares no code with ours."""
    return {
        name: np.array(values, np.float32).reshape(shape) for name, (_, shape, values) in reference.decode(data).items()
    }


def test_any_reader_has_a_standard_density_made_and_follows_the_job(hub: Hub, expert: str) -> None:
    answer, told = fetched(hub, f"/api/v1/experts/{expert}/compressed?density=0.3")
    assert answer.status_code == 200, answer.text
    assert told >= 1
    assert answer.headers["ETag"] == f'"{tiny.sha256(answer.content)}"'
    assert [(values != 0).sum() for values in decoded(answer.content).values()] == [round(0.3 * 8 * 384)] * 4
    record = httpx.get(f"{hub.url}/api/v1/experts/{expert}").json()
    assert record["state"] == "ready"
    form = next(form for form in record["compressed_forms"] if form["density"] == 0.3)
    assert (form["bytes"], form["sha256"]) == (len(answer.content), tiny.sha256(answer.content))


def test_stock_peft_loads_the_reconstruction_at_first_touch_as_the_download_decodes(
    hub: Hub, expert: str, tmp_path: Path
) -> None:
    out = tmp_path / "loaded.safetensors"
    seen = run(sys.executable, "compressed_client.py", expert, "compeft-k10", out, hub=hub, home=tmp_path / "home")
    assert seen["files"] == sorted(FILES)
    compressed, _ = fetched(hub, f"/api/v1/experts/{expert}/compressed?density=0.1")
    wanted = decoded(compressed.content)
    loaded = load_file(out)
    assert loaded.keys() == wanted.keys()
    for name, values in wanted.items():
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name], values), name
    snapshot = Path(seen["folder"])
    kept = load_file(snapshot / "adapter_model.safetensors")
    assert all(np.array_equal(kept[name], values) for name, values in wanted.items())
    for name in ("README.md", "adapter_config.json"):
        assert (snapshot / name).read_bytes() == FILES[name]
    info = httpx.get(f"{hub.url}/api/models/{expert}/revision/compeft-k10").json()
    assert (len(seen["commit"]), info["sha"]) == (40, seen["commit"])
    listed = httpx.get(f"{hub.url}/api/v1/experts/{expert}/revisions").json()["items"]
    assert seen["commit"] not in {row["revision"] for row in listed}
    assert len(listed) == 1
