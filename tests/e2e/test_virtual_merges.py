"""Merges that nobody has computed yet, read by stock clients from the hub as `bin/run` starts it."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest

from tests import tiny
from tests.e2e.test_hub_clients import run, wait_until_ready
from tests.hubs import Hub

EXPERTS = {
    "virtual-a": tiny.lora(seed=21, rank=8, alpha=16, modules=(tiny.QUERY, tiny.VALUE)),
    "virtual-b": tiny.lora(seed=22, rank=4, alpha=2, modules=(tiny.QUERY, tiny.VALUE)),
}


@pytest.fixture(scope="module")
def folders(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two ready experts of the administrator, private so that routing over the demo experts does not see them."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.api_key)
    found = {}
    for name, files in EXPERTS.items():
        found[name] = tiny.write(files, tmp_path_factory.mktemp(name))
        api.create_repo(f"{hub.username}/{name}", private=True)
        api.upload_folder(repo_id=f"{hub.username}/{name}", folder_path=found[name])
    for name in EXPERTS:
        wait_until_ready(hub, f"{hub.username}/{name}")
    yield found
    for name in EXPERTS:
        api.delete_repo(f"{hub.username}/{name}")


def registered(hub: Hub, **changes: object) -> dict:
    """A merge that has an address and no job."""
    weights = {"virtual-a": 0.7, "virtual-b": -0.4}
    body = {
        "base_model": tiny.BASE,
        "method": "linear",
        "parameters": {"normalize": False},
        "experts": [{"expert": f"{hub.username}/{name}", "weight": weight} for name, weight in weights.items()],
        "start": False,
        **changes,
    }
    answer = httpx.post(f"{hub.url}/api/v1/merges", json=body, headers=hub.headers)
    assert answer.status_code == 202, answer.text
    assert (answer.json()["state"], answer.json()["job"]) == ("registered", None)
    return answer.json()


def now(hub: Hub, merge: dict) -> dict:
    return httpx.get(f"{hub.url}/api/v1/merges/{merge['id']}", headers=hub.headers).json()


def jobs_of(hub: Hub, merge: dict) -> list[tuple[str, int]]:
    """State and attempts of every job that a merge has had."""
    with psycopg.connect(hub.doors["database_url"]) as link:
        return link.execute("select state, attempt from registry_job where merge_id = %s", [merge["id"]]).fetchall()


def test_stock_peft_loads_a_merge_that_did_not_exist_when_the_call_began(
    hub: Hub, folders: dict[str, Path], tmp_path: Path
):
    merge = registered(hub)
    own = [folders["virtual-a"], 0.7, folders["virtual-b"], -0.4]
    seen = run(sys.executable, "merge_client.py", merge["repo"], *own, hub=hub, home=tmp_path / "home")
    assert seen["effect"] > 0.01
    assert seen["difference"] < 1e-4
    assert now(hub, merge)["state"] == "ready"
    assert jobs_of(hub, merge) == [("done", 1)]


def check_many(hub: Hub, home: Path, *, clients: int, processes: int) -> None:
    merge = registered(hub, method="ties", parameters={"density": clients / 200})

    def some(number: int) -> dict:
        place = home / str(number)
        count = clients // processes
        return run(sys.executable, "many_clients.py", merge["repo"], count, place, hub=hub, home=place / "home")

    with ThreadPoolExecutor(processes) as pool:
        seen = list(pool.map(some, range(processes)))
    assert [error for part in seen for error in part["errors"]] == []
    digests = [record for part in seen for record in part["digests"]]
    assert len(digests) == clients
    assert all(record == digests[0] for record in digests)
    assert digests[0] == {file["path"]: file["sha256"] for file in now(hub, merge)["files"]}
    assert "adapter_model.safetensors" in digests[0]
    assert jobs_of(hub, merge) == [("done", 1)]


def test_many_clients_that_ask_at_once_for_a_new_merge_get_the_same_bytes_from_one_job(
    hub: Hub, folders: dict[str, Path], tmp_path: Path
):
    check_many(hub, tmp_path, clients=24, processes=2)


@pytest.mark.clients
def test_a_hundred_clients_that_ask_at_once_for_a_new_merge_get_the_same_bytes_from_one_job(
    hub: Hub, folders: dict[str, Path], tmp_path: Path
):
    check_many(hub, tmp_path, clients=100, processes=4)
