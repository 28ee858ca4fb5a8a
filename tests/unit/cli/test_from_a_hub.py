"""`moerge pull` and `moerge verify REF` against a scripted hub: statuses, words, and a process without torch."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge import compression
from tests import tiny
from tests.unit.client import hubs, servers
from tests.unit.client.servers import problem, stored

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "adapter_model.safetensors"
# What is installed where these tests run, but not where the command runs.
FOREIGN = ("torch", "django", "rest_framework", "celery", "transformers", "peft", "huggingface_hub", "requests", "tqdm",
           "faiss", "sentence_transformers", "scipy", "registry", "config")  # fmt: skip


@pytest.fixture
def server() -> Iterator[servers.Server]:
    with servers.running() as found:
        yield found


@pytest.fixture
def tree() -> dict[str, bytes]:
    return tiny.lora(seed=4, rank=8, modules=(tiny.QUERY, tiny.VALUE))


@pytest.fixture
def encoded(tree, tmp_path) -> bytes:
    source = tiny.write(tree, tmp_path / "encode")
    compression.compress(source, tmp_path / "encoded", density=0.1)
    return (tmp_path / "encoded").read_bytes()


def test_pull_tells_what_came_and_that_it_was_verified(moerge, server, tree, tmp_path):
    hubs.publish(server, tree)
    done = moerge("pull", hubs.NAME, "--out", tmp_path / "out", "--endpoint", server.url, "--token", "key-1")
    assert (done.status, done.err) == (0, "")
    assert f"{hubs.NAME} at {hubs.COMMIT}" in done.out
    assert f"{len(tree)}, {sum(map(len, tree.values())):,} bytes downloaded" in done.out
    assert "ok: every file" in done.out
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer key-1"}
    again = moerge("pull", hubs.NAME, "--out", tmp_path / "out", "--endpoint", server.url, "--json").json
    assert sorted(again["kept"]) == sorted(tree)
    assert (again["revision"], again["downloaded_bytes"], again["compressed"]) == (hubs.COMMIT, 0, None)
    assert {row["path"]: row["sha256"] for row in again["files"]} == {p: hubs.sha256(d) for p, d in tree.items()}


def test_pull_compressed_says_what_held(moerge, server, tree, encoded, tmp_path):
    hubs.publish(server, tree, encoded=encoded)
    options = ["--endpoint", server.url, "--compressed", "--density", "0.1", "--recipe", "default"]
    done = moerge("pull", f"{hubs.NAME}@main", "--out", tmp_path / "out", *options)
    assert done.status == 0, done.err
    assert "ok: every rule of compeft/1" in done.out
    assert server.of(hubs.ENCODED)[0].query == {"revision": hubs.COMMIT, "density": "0.1", "preset": "default"}
    facts = moerge("pull", hubs.NAME, "--out", tmp_path / "again", *options, "--json").json["compressed"]
    assert facts["sha256"] == hubs.sha256(encoded)
    assert facts["density"] == "0.1"


def test_the_environment_names_the_hub_and_the_key(moerge, server, tree, tmp_path, monkeypatch):
    hubs.publish(server, tree)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "key-2")
    assert moerge("verify", hubs.NAME).status == 0
    assert moerge("pull", hubs.NAME, "--out", tmp_path / "out").status == 0
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer key-2"}


def test_verify_of_a_reference_checks_files_adapter_and_compressed_form(moerge, server, tree, encoded):
    hubs.publish(server, tree, encoded=encoded)
    done = moerge("verify", hubs.NAME, "--endpoint", server.url)
    assert done.status == 0, done.err
    assert f"{WEIGHTS}" in done.out
    assert "made from these weights" in done.out
    record = moerge("verify", hubs.NAME, "--endpoint", server.url, "--json").json
    assert (record["verified"], record["revision"]) == (True, hubs.COMMIT)
    assert [check["kind"] for check in record["checks"]] == [*["file"] * len(tree), "adapter", "encoded"]


def test_damage_is_3_and_a_refusal_is_1_with_the_problem_of_the_hub(moerge, server, tree, encoded, tmp_path):
    hubs.publish(server, tree, encoded=encoded)
    options = ["--out", tmp_path / "out", "--endpoint", server.url]
    server.routes[hubs.address(WEIGHTS)] = stored(tree[WEIGHTS][::-1], "tag")
    done = moerge("pull", hubs.NAME, *options, "--json")
    assert (done.status, done.json["problem"]["code"]) == (3, "download-damaged")
    assert moerge("verify", hubs.NAME, "--endpoint", server.url).status == 3
    fault = {"pointer": "/name", "met": "tee", "wanted": "tea", "remedy": "Write tea."}
    address = "/api/v1/experts/ann/tee/revisions/main"
    server.routes[address] = [problem(404, "expert-not-found", "No such expert.", errors=[fault])]
    for command in (["pull", "ann/tee", *options], ["verify", "ann/tee", "--endpoint", server.url]):
        done = moerge(*command, "--json")
        assert done.status == 1
        assert done.json["problem"]["code"] == "expert-not-found"
        assert done.json["problem"]["status"] == 404
        for words in ("No such expert.", "Write tea.", "r-1"):
            assert words in done.err
    assert not (tmp_path / "out").exists()


def test_words_of_a_hub_do_not_command_the_terminal(moerge, server, tree, tmp_path):
    """Escape sequences could rewrite what stands on the screen; a right-to-left mark turns names round."""
    nasty = "gone\x1b[2J\x9b1m\u202e.\nmoerge: all is well"
    server.routes[f"/api/v1/experts/{hubs.NAME}/revisions/main"] = [problem(404, "expert-not-found", nasty)]
    done = moerge("pull", hubs.NAME, "--out", tmp_path / "out", "--endpoint", server.url, "--json")
    assert done.json["problem"]["detail"] == nasty
    for sign in "\x1b\x9b\u202e":
        assert sign not in done.err + done.out
    assert done.err.count("\n") == 2
    hubs.publish(server, tree)
    server.routes[hubs.ENCODED] = [problem(404, "file-not-found", nasty)]
    done = moerge("verify", hubs.NAME, "--endpoint", server.url)
    assert "all is well" in done.err
    assert "\x1b" not in done.err


def test_a_hub_that_is_never_ready_is_1_when_the_time_is_over(moerge, server, tree, tmp_path):
    hubs.publish(server, tree)
    server.routes[hubs.ENCODED] = [problem(503, "form-pending", "It is being made.", retry_after=2)]
    options = ["--out", tmp_path / "out", "--endpoint", server.url, "--compressed", "--timeout", "0.05"]
    done = moerge("pull", hubs.NAME, *options)
    assert done.status == 1
    assert "waited-too-long" in done.err
    assert "--timeout" in done.err
    assert not (tmp_path / "out").exists()


def test_everything_runs_where_neither_torch_nor_django_can_be_imported(server, tree, encoded, tmp_path):
    """One process goes through all commands; a finder at the head of the import system refuses the rest of the house."""
    hubs.publish(server, tree, encoded=encoded)
    script = f"""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {FOREIGN!r}:
                    raise AssertionError(f"{{name}} was imported")

        sys.meta_path.insert(0, Refuse())
        from moerge.cli import main

        work, url = {str(tmp_path / "work")!r}, {server.url!r}
        for arguments in [
            ["--help"],
            ["pull", "{hubs.NAME}", "--out", f"{{work}}/whole", "--endpoint", url],
            ["pull", "{hubs.NAME}", "--out", f"{{work}}/small", "--endpoint", url, "--compressed"],
            ["verify", "{hubs.NAME}", "--endpoint", url],
            *(["compress", f"{{work}}/whole", f"{{work}}/{{recipe}}", "--recipe", recipe] for recipe in
              ("default", "paper", "hq", "int4")),
            ["decompress", f"{{work}}/default", f"{{work}}/out"],
            ["decompress", f"{{work}}/int4", f"{{work}}/out4"],
            ["verify", f"{{work}}/hq"],
            ["verify", f"{{work}}/out"],
            ["merge", f"{{work}}/ties.json", "--out", f"{{work}}/ties"],
            ["merge", f"{{work}}/iso_c.json", "--out", f"{{work}}/iso_c", "--local", "--endpoint", url],
            ["merge", f"{{work}}/dare.json", "--check"],
            ["verify", f"{{work}}/iso_c"],
        ]:
            status = main(arguments)
            assert status == 0, (arguments, status)
        print("all done")
        """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DJANGO_"))}
    kept["MOERGE_CACHE"] = str(tmp_path / "cache")
    (tmp_path / "work").mkdir()
    for method in ("ties", "iso_c", "dare"):
        second = hubs.NAME if method == "iso_c" else "./out"
        recipe = {"method": method, "experts": [{"expert": "./whole"}, {"expert": second}]}
        (tmp_path / "work" / f"{method}.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all done"
    small, expected = load_file(tmp_path / "work" / "small" / WEIGHTS), tmp_path / "expected"
    compression.decompress(tmp_path / "encoded", expected)
    for name, values in load_file(expected / WEIGHTS).items():
        np.testing.assert_array_equal(small[name], values)
    assert json.loads((tmp_path / "work" / "out" / "adapter_config.json").read_text())["r"] == 8
    assert load_file(tmp_path / "work" / "ties" / WEIGHTS).keys() == load_file(expected / WEIGHTS).keys()
