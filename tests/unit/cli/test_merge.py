"""`moerge merge`: folders here, references by a hub or here, what is refused, and what a folder holds afterwards."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from moerge import compression
from moerge.client import drafts, merging
from tests import tiny
from tests.unit.client import hubs, servers
from tests.unit.client.servers import as_json, problem, stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE, COMMIT, JOB = "0123456789abcdef0123", "d" * 40, "job-7"
KEY = "base_model.model.{}.lora_{}.weight"


@pytest.fixture
def server() -> Iterator[servers.Server]:
    with servers.running() as found:
        yield found


@pytest.fixture(autouse=True)
def no_cache_of_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def experts(tmp_path) -> dict[str, Path]:
    """Two experts of unequal rank, one module of which only the first has."""
    return {
        "tea": tiny.write(tiny.lora(seed=1, rank=2, alpha=6, modules=(tiny.QUERY, tiny.VALUE)), tmp_path / "tea"),
        "cup": tiny.write(tiny.lora(seed=2, rank=3, alpha=4), tmp_path / "cup"),
    }


@pytest.fixture
def recipe(tmp_path, experts) -> Path:
    return write(tmp_path / "recipe.json")


def write(path: Path, **changes) -> Path:
    body = {
        "method": "linear",
        "experts": [{"expert": "./tea", "weight": 0.75}, {"expert": "./cup", "weight": -0.5}],
        **changes,
    }
    path.write_text(json.dumps({name: value for name, value in body.items() if value is not ...}))
    return path


def delta(folder: Path, module: str, *, scaling: float) -> np.ndarray:
    found = load_file(folder / WEIGHTS)
    return scaling * found[KEY.format(module, "B")].astype(np.float64) @ found[KEY.format(module, "A")]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_merged_here_and_the_sum_is_what_numpy_says(moerge, recipe, experts, tmp_path):
    done = moerge("merge", recipe, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    out = tmp_path / "out"
    tea, cup = experts["tea"], experts["cup"]
    wanted = 0.75 * delta(tea, tiny.QUERY, scaling=3) - 0.5 * delta(cup, tiny.QUERY, scaling=4 / 3)
    np.testing.assert_allclose(delta(out, tiny.QUERY, scaling=1), wanted, atol=1e-5 * np.abs(wanted).max())
    alone = 0.75 * delta(tea, tiny.VALUE, scaling=3)
    np.testing.assert_allclose(delta(out, tiny.VALUE, scaling=1), alone, atol=1e-5 * np.abs(alone).max())
    config = json.loads((out / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (5, 5, tiny.BASE)
    assert sorted(content(out)) == [CONFIG, WEIGHTS, "recipe.json", "report.json"]
    for words in ("linear", "0.75 of ./tea", "-0.5 of ./cup", "rank", "100.0%", WEIGHTS):
        assert words in done.out
    assert "1 of 2 modules are missing in some experts" in done.err


def test_json_is_one_object_that_tells_recipe_report_and_files(moerge, recipe, experts, tmp_path):
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json", "--quiet")
    assert (done.status, done.err) == (0, "")
    told = done.json
    assert (told["by"], told["merge"], told["out"]) == ("here", None, str(tmp_path / "out"))
    assert told["recipe"] == json.loads((tmp_path / "out" / "recipe.json").read_text())
    digests = {
        item["expert"]: tiny.sha256(
            f"{tiny.sha256((folder / WEIGHTS).read_bytes())}\n{tiny.sha256((folder / CONFIG).read_bytes())}".encode()
        )
        for item, folder in (({"expert": f"./{name}"}, path) for name, path in experts.items())
    }
    assert {item["expert"]: item["digest"] for item in told["recipe"]["experts"]} == digests
    assert (told["report"]["rank"], told["report"]["energy_kept"]) == (5, 1.0)
    assert {row["path"]: row["sha256"] for row in told["files"]} == {
        path: tiny.sha256(data) for path, data in content(tmp_path / "out").items()
    }


def test_the_recipe_that_a_merge_leaves_makes_the_same_merge_again(moerge, recipe, tmp_path, monkeypatch):
    assert moerge("merge", write(recipe, method="dare", seed=5), "--out", tmp_path / "out").status == 0
    monkeypatch.chdir(tmp_path)
    done = moerge("merge", tmp_path / "out" / "recipe.json", "--out", tmp_path / "again")
    assert done.status == 0, done.err
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_a_recipe_that_names_the_content_of_its_experts_takes_no_other(moerge, recipe, experts, tmp_path, monkeypatch):
    assert moerge("merge", recipe, "--out", tmp_path / "out").status == 0
    monkeypatch.chdir(tmp_path)
    tiny.write(tiny.lora(seed=9, rank=3, alpha=4), experts["cup"])
    done = moerge("merge", tmp_path / "out" / "recipe.json", "--out", tmp_path / "again")
    assert done.status == 1
    assert "./cup is not what the recipe was written for" in done.err
    assert not (tmp_path / "again").exists()


def test_without_weights_every_expert_counts_alike(moerge, recipe, tmp_path):
    write(recipe, experts=[{"expert": "./tea"}, {"expert": "./cup"}])
    told = moerge("merge", recipe, "--out", tmp_path / "out", "--json").json
    assert [item["weight"] for item in told["recipe"]["experts"]] == [0.5, 0.5]


def test_names_and_order_of_experts_change_no_byte_of_the_weights(moerge, recipe, experts, tmp_path):
    changes = {"method": "dare", "seed": 3}
    moerge("merge", write(recipe, **changes), "--out", tmp_path / "one")
    experts["tea"].rename(tmp_path / "renamed")
    turned = [{"expert": "./cup", "weight": -0.5}, {"expert": str(tmp_path / "renamed"), "weight": 0.75}]
    done = moerge("merge", write(recipe, **changes, experts=turned), "--out", tmp_path / "other")
    assert done.status == 0, done.err
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_a_folder_is_looked_for_beside_the_recipe_and_then_in_the_working_directory(
    moerge, recipe, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert moerge("merge", recipe, "--out", "beside").status == 0
    monkeypatch.chdir(tmp_path)
    moved = recipe.rename(tmp_path / "elsewhere" / "recipe.json")
    assert moerge("merge", moved, "--out", "here").status == 0
    assert content(tmp_path / "here") == content(tmp_path / "elsewhere" / "beside")


def test_an_earlier_merge_is_replaced_and_nothing_else_in_its_folder(moerge, recipe, tmp_path):
    out = tmp_path / "out"
    moerge("merge", recipe, "--out", out)
    before = content(out)
    tiny.write({"notes.txt": b"mine", "README.md": b"mine too", "delta.safetensors": b"old"}, out)
    assert moerge("merge", write(recipe, method="cat"), "--out", out).status == 0
    after = content(out)
    assert after.pop("notes.txt") == b"mine"
    assert after.pop("README.md") == b"mine too"
    assert after.keys() == before.keys()
    assert json.loads(after["recipe.json"])["method"] == "cat"


def test_the_card_of_a_merge_of_a_hub_goes_with_it(moerge, recipe, tmp_path):
    out = tmp_path / "out"
    moerge("merge", recipe, "--out", out)
    tiny.write({"README.md": b"the hub's", "lineage.json": b"{}"}, out)
    assert moerge("merge", recipe, "--out", out).status == 0
    assert sorted(content(out)) == [CONFIG, WEIGHTS, "recipe.json", "report.json"]


@pytest.mark.parametrize(
    "tree", [{"notes.txt": b"x"}, {"recipe.json": b"{}"}, {"recipe.json": b"for soup"}, tiny.lora()]
)
def test_a_folder_with_something_else_is_left_as_it_is(moerge, recipe, tmp_path, tree):
    out = tiny.write(tree, tmp_path / "out")
    done = moerge("merge", recipe, "--out", out)
    assert done.status == 2
    assert "something else" in done.err
    assert content(out) == tree
    done = moerge("merge", recipe, "--out", recipe)
    assert done.status == 2
    assert "a file" in done.err


def test_a_merge_that_is_stopped_leaves_nothing(recipe, tmp_path):
    def stop(what: str, share: float | None) -> None:
        if share:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merging.here(drafts.read(recipe), tmp_path / "out", progress=stop)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"method": "tiess"}, "/method", "ties"),
        ({"method": ...}, "/method", "names no method"),
        ({"parameters": {"scal": 1}}, "/parameters/scal", "scal"),
        ({"output": {"rank": 0}}, "/output/rank", "whole number"),
        ({"experts": [{"expert": "./tea", "weight": "much"}]}, "/experts/0/weight", "number"),
        ({"experts": [{"expert": "./tea", "weight": 1}, {"expert": "./cup"}]}, "/experts/1/weight", "number"),
        ({"experts": [{"expert": "./tea", "wieght": 1}]}, "/experts/0/wieght", "weight"),
        ({"experts": [{"expert": "./no-such"}]}, "/experts/0/expert", "no folder"),
        ({"experts": [{"expert": "/no/such"}]}, "/experts/0/expert", "no folder"),
        ({"experts": [{"expert": "tea with milk"}]}, "/experts/0/expert", "begin it with ./"),
        ({"experts": [{"expert": ""}]}, "/experts/0/expert", "Name the expert"),
        ({"experts": ["./tea"]}, "/experts/0", "object"),
        ({"experts": []}, "/experts", "1 to"),
        ({"experts": [{"expert": "./tea"}] * 101}, "/experts", "101"),
        ({"experts": ...}, "/experts", "1 to"),
        ({"recipe": 1}, "/recipe", "recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_by_field_before_anything_is_touched(
    moerge, recipe, tmp_path, *, changes, pointer, words
):
    done = moerge("merge", write(recipe, **changes), "--out", tmp_path / "out", "--json")
    assert done.status == 1
    fault = done.json["problem"]["errors"][0]
    assert fault["pointer"] == pointer
    assert pointer in done.err
    assert words in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"method": "linear", "method": "ties"}', '{"seed": NaN}', "{" * 100, "\udcff", " " * 2**21]
)
def test_what_is_no_recipe_at_all_is_refused(moerge, tmp_path, text):
    place = tmp_path / "recipe.json"
    place.write_bytes(text.encode(errors="surrogateescape"))
    done = moerge("merge", place, "--out", tmp_path / "out")
    assert (done.status, done.err.startswith("moerge: recipe-invalid: ")) == (1, True)
    assert moerge("merge", tmp_path / "none.json", "--out", tmp_path / "out").status == 1


def test_an_expert_that_cannot_be_merged_is_named(moerge, recipe, experts, tmp_path):
    (experts["cup"] / WEIGHTS).unlink()
    done = moerge("merge", recipe, "--out", tmp_path / "out")
    assert done.status == 1
    assert f"./cup is no adapter: there is no {WEIGHTS}" in done.err
    (experts["cup"] / CONFIG).write_bytes(tiny.config(r=3, lora_alpha=4, target_modules=["query"], use_dora=True))
    tiny.write({WEIGHTS: tiny.lora(rank=3)[WEIGHTS]}, experts["cup"])
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json")
    assert done.status == 1
    assert done.json["problem"]["code"] == "experts-incompatible"
    assert done.json["problem"]["errors"][0]["pointer"] == "/experts/1/expert"
    assert "./cup cannot be merged" in done.err
    assert not (tmp_path / "out").exists()


def test_experts_of_two_bases_are_refused_unless_the_recipe_says_which_base_is_meant(moerge, recipe, experts, tmp_path):
    tiny.write(tiny.lora(seed=2, rank=3, alpha=4, base="ann/other"), experts["cup"])
    done = moerge("merge", recipe, "--out", tmp_path / "out")
    assert done.status == 1
    assert "ann/other" in done.err
    done = moerge("merge", write(recipe, base_model="ann/same"), "--out", tmp_path / "out")
    assert done.status == 0
    assert "./cup says that it was trained on ann/other; the recipe says ann/same." in done.err
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "ann/same"


# Other outputs, and what else lies in folders.


def test_a_dense_delta_and_a_ternary_one_are_of_the_same_sum(moerge, recipe, experts, tmp_path):
    name = f"{tiny.QUERY}.weight"
    wanted = 0.75 * delta(experts["tea"], tiny.QUERY, scaling=3) - 0.5 * delta(
        experts["cup"], tiny.QUERY, scaling=4 / 3
    )
    assert moerge("merge", write(recipe, output={"kind": "delta"}), "--out", tmp_path / "dense").status == 0
    dense = load_file(tmp_path / "dense" / "delta.safetensors")[name]
    np.testing.assert_allclose(dense, wanted, atol=1e-5 * np.abs(wanted).max())
    done = moerge(
        "merge", write(recipe, output={"kind": "ternary", "density": 0.2}), "--out", tmp_path / "few", "--json"
    )
    assert done.status == 0, done.err
    assert sorted(content(tmp_path / "few")) == ["delta.compeft", "delta.json", "recipe.json", "report.json"]
    told = done.json["report"]["ternary"]
    assert told["density"] == 0.2
    assert done.json["report"]["energy_kept"] == pytest.approx(1 - told["rel_error"] ** 2)
    assert "Ternary at density 0.2 keeps" in done.err
    with compression.open_any(tmp_path / "few" / "delta.compeft") as opened:
        few = dict(opened.walk())
    kept = np.flatnonzero(few[name])
    assert len(kept) == round(0.2 * wanted.size)
    # Ternary keeps the largest values: none that is left out is larger than one that is kept.
    size = np.abs(dense).ravel()
    assert np.delete(size, kept).max() <= size[kept].min()
    np.testing.assert_array_equal(np.sign(few[name].ravel()[kept]), np.sign(dense.ravel()[kept]))


def test_statistics_beside_an_expert_are_used_by_the_methods_that_need_them(moerge, recipe, experts, tmp_path):
    write(recipe, method="fisher", experts=[{"expert": "./tea"}, {"expert": "./cup"}], output={"kind": "delta"})
    tiny.write(tiny.lora(seed=1, rank=2, alpha=6), experts["tea"])
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json")
    assert (done.status, done.json["problem"]["errors"][0]["pointer"]) == (1, "/experts/0/statistics")
    noise = np.random.default_rng(5)
    known = {}
    for name, folder in experts.items():
        known[name] = noise.random(tiny.SHAPES[tiny.QUERY], np.float32)
        about = {"kinds": "fisher_diag", "examples": "3", "label_policy": "true"}
        save_file({f"{tiny.QUERY}.fisher_diag": known[name]}, folder / "stats.safetensors", metadata=about)
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    top = sum(0.5 * (known[name] + 1e-6) * delta(experts[name], tiny.QUERY, scaling=scaling)
              for name, scaling in (("tea", 3), ("cup", 4 / 3)))  # fmt: skip
    wanted = top / sum(0.5 * (known[name] + 1e-6) for name in known)
    found = load_file(tmp_path / "out" / "delta.safetensors")[f"{tiny.QUERY}.weight"]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    told = {item["expert"]: item["statistics"] for item in done.json["recipe"]["experts"]}
    assert told == {
        f"./{name}": tiny.sha256((path / "stats.safetensors").read_bytes()) for name, path in experts.items()
    }
    save_file({"other.fisher_diag": known["tea"]}, experts["tea"] / "stats.safetensors", metadata=about)
    done = moerge("merge", recipe, "--out", tmp_path / "none")
    assert (done.status, "./tea cannot be merged" in done.err) == (1, True)


@pytest.fixture
def base(tmp_path) -> Path:
    """A checkpoint with the two modules of the experts and a tensor that nobody trains."""
    noise = np.random.default_rng(7)
    arrays = {f"{module}.weight": noise.normal(size=shape).astype(np.float32) for module, shape in tiny.SHAPES.items()}
    return checkpoint(tmp_path / "base", arrays | {"pooler.bias": np.ones(4, np.float32)})


def checkpoint(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def test_what_depends_on_the_base_takes_its_weights_from_a_folder(moerge, recipe, base, tmp_path):
    """DoRA: the rows of base plus delta are given new lengths (arXiv 2402.09353)."""
    tree = tiny.lora(seed=1, rank=2, alpha=6)
    arrays = load(tree[WEIGHTS])
    lengths = np.random.default_rng(2).random(384).astype(np.float32) + 1
    arrays[f"base_model.model.{tiny.QUERY}.lora_magnitude_vector"] = lengths
    config = tiny.config(r=2, lora_alpha=6, target_modules=["query"], use_dora=True)
    dora = tiny.write({**tree, WEIGHTS: tiny.dump(arrays), CONFIG: config}, tmp_path / "dora")
    write(recipe, experts=[{"expert": "./dora", "weight": 1}], output={"kind": "full"})
    done = moerge("merge", recipe, "--out", tmp_path / "out")
    assert done.status == 1
    assert "base" in done.err
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--base", base, "--json")
    assert done.status == 0, done.err
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    sum_ = before[f"{tiny.QUERY}.weight"] + delta(dora, tiny.QUERY, scaling=3)
    wanted = lengths[:, None] * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
    np.testing.assert_allclose(after[f"{tiny.QUERY}.weight"], wanted, atol=1e-4 * np.abs(wanted).max())
    for name in (f"{tiny.VALUE}.weight", "pooler.bias"):
        np.testing.assert_array_equal(after[name], before[name])
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()
    line = f"model.safetensors {tiny.sha256((base / 'model.safetensors').read_bytes())}\n"
    assert done.json["recipe"]["base_weights"] == tiny.sha256(line.encode())
    # The same by the name of the folder in the recipe.
    write(recipe, experts=[{"expert": "./dora", "weight": 1}], output={"kind": "full"}, base_model="./base")
    assert moerge("merge", recipe, "--out", tmp_path / "again").status == 0
    again = content(tmp_path / "again")
    assert again["model.safetensors"] == content(tmp_path / "out")["model.safetensors"]


def test_ia3_alone_becomes_ia3(moerge, recipe, base, tmp_path):
    """An IA3 vector multiplies what a module gives, so what is weighed is its distance from one."""
    name = f"base_model.model.{tiny.QUERY}.ia3_l"
    vectors = {}
    for seed, folder in enumerate(("first", "second")):
        vectors[folder] = np.random.default_rng(seed).random((384, 1)).astype(np.float32) + 0.5
        fields = {"peft_type": "IA3", "base_model_name_or_path": tiny.BASE, "target_modules": ["query"],
                  "feedforward_modules": []}  # fmt: skip
        tiny.write(
            {WEIGHTS: tiny.dump({name: vectors[folder]}), CONFIG: json.dumps(fields).encode()}, tmp_path / folder
        )
    write(recipe, experts=[{"expert": "./first", "weight": 0.5}, {"expert": "./second", "weight": 0.25}])
    done = moerge("merge", recipe, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == "IA3"
    wanted = 1 + 0.5 * (vectors["first"] - 1) + 0.25 * (vectors["second"] - 1)
    found = load_file(tmp_path / "out" / WEIGHTS)[name]
    np.testing.assert_allclose(found.ravel(), wanted.ravel(), atol=1e-6)
    # As a delta of the base's weights it needs them.
    write(recipe, experts=[{"expert": "./first", "weight": 0.5}], output={"kind": "delta"})
    assert moerge("merge", recipe, "--out", tmp_path / "delta").status == 1
    assert moerge("merge", recipe, "--out", tmp_path / "delta", "--base", base).status == 0
    rows = load_file(base / "model.safetensors")[f"{tiny.QUERY}.weight"]
    found = load_file(tmp_path / "delta" / "delta.safetensors")[f"{tiny.QUERY}.weight"]
    np.testing.assert_allclose(found, 0.5 * (vectors["first"] - 1) * rows, atol=1e-5)


def test_a_base_that_the_result_does_not_depend_on_changes_nothing(moerge, recipe, base, tmp_path):
    moerge("merge", recipe, "--out", tmp_path / "without")
    assert moerge("merge", recipe, "--out", tmp_path / "with", "--base", base).status == 0
    assert content(tmp_path / "with") == content(tmp_path / "without")


def test_full_checkpoints_are_merged_into_one(moerge, recipe, base, tmp_path):
    start = load_file(base / "model.safetensors")
    noise = np.random.default_rng(8)
    tuned = {}
    for name in ("one", "two"):
        tuned[name] = {
            key: values + noise.normal(size=values.shape).astype(np.float32) for key, values in start.items()
        }
        checkpoint(tmp_path / name, tuned[name])
    experts = [{"expert": "./one", "weight": 0.5}, {"expert": "./two", "weight": 0.25}]
    done = moerge("merge", write(recipe, base_model="./base", experts=experts), "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == start.keys()
    for name, values in start.items():
        wanted = values + 0.5 * (tuned["one"][name] - values) + 0.25 * (tuned["two"][name] - values)
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    assert done.json["recipe"]["output"]["kind"] == "full"
    checked = moerge("merge", recipe, "--check")
    assert (checked.status, "checkpoint" in checked.out) == (0, True)
    tea = write(recipe, base_model="./base", experts=[*experts, {"expert": "./tea", "weight": 1}])
    done = moerge("merge", tea, "--out", tmp_path / "none")
    assert (done.status, f"./one is no adapter: there is no {CONFIG}" in done.err) == (1, True)


YAML = """
method: linear     # as in recipe.json
experts:
  - {expert: ./tea, weight: 0.75}
  - expert: ./cup
    weight: -0.5
"""
MERGEKIT = """
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./base+./tea
    parameters: {weight: 0.75}
  - model: ./base+./cup
    parameters: {weight: -0.5}
"""


def test_recipes_are_yaml_too_ours_or_mergekits(moerge, recipe, experts, base, tmp_path):
    moerge("merge", recipe, "--out", tmp_path / "json")
    for number, (name, text) in enumerate((("a.yaml", YAML), ("a.yml", YAML), ("a", YAML), ("kit.yaml", MERGEKIT))):
        (tmp_path / name).write_text(text)
        done = moerge("merge", tmp_path / name, "--out", tmp_path / str(number))
        assert done.status == 0, done.err
        assert (tmp_path / str(number) / WEIGHTS).read_bytes() == (tmp_path / "json" / WEIGHTS).read_bytes()
    (tmp_path / "wrong.yaml").write_text(YAML.replace("weight: -0.5", "weight: -0.5\n    weight: 1"))
    done = moerge("merge", tmp_path / "wrong.yaml", "--out", tmp_path / "none")
    assert (done.status, "Line 7" in done.err) == (1, True)
    (tmp_path / "soup.yaml").write_text(MERGEKIT.replace("task_arithmetic", "model_stock"))
    done = moerge("merge", tmp_path / "soup.yaml", "--out", tmp_path / "none")
    assert (done.status, "model_stock" in done.err) == (1, True)


def test_a_check_tells_what_a_merge_would_give_and_writes_nothing(moerge, recipe, experts, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = moerge("merge", recipe, "--check")
    assert (done.status, sorted(tmp_path.rglob("*"))) == (0, before)
    for words in ("linear", "./tea at local (lora, rank 2, modules 2)", "lora, rank 5", "can be merged"):
        assert words in done.out
    told = moerge("merge", recipe, "--check", "--json").json
    merged = moerge("merge", recipe, "--out", tmp_path / "out", "--json").json
    assert told["digest"] == merged["digest"]
    assert told["output"]["rank"] == merged["report"]["rank"]
    written = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert written <= told["cost"]["written_bytes"] < 1.2 * written
    for changes, pointer in (
        ({"method": "tiess"}, "/method"),
        ({"method": "cat", "output": {"rank": 4}}, "/output/rank"),
    ):
        done = moerge("merge", write(recipe, **changes), "--check", "--json")
        assert (done.status, done.json["problem"]["errors"][0]["pointer"]) == (1, pointer)


# Experts on a hub.


def publish(server: servers.Server, name: str, tree: dict[str, bytes], *, commit: str) -> None:
    rows = [{"path": path, "size": len(data), "sha256": hubs.sha256(data)} for path, data in tree.items()]
    record = {"expert": name, "revision": commit, "base_model": "b", "state": "ready", "files": rows}
    for revision in ("main", commit):
        server.routes[f"/api/v1/experts/{name}/revisions/{revision}"] = [as_json(record)]
    for path, data in tree.items():
        server.routes[f"/{name}/resolve/{commit}/{path}"] = stored(data, f"git-of-{path}")


@pytest.fixture
def published(server, experts) -> servers.Server:
    for letter, (name, folder) in zip("ab", experts.items(), strict=True):
        publish(server, f"ann/{name}", content(folder), commit=letter * 40)
    return server


@pytest.fixture
def remote(tmp_path) -> Path:
    return write(
        tmp_path / "remote.json",
        method="dare",
        seed=1,
        experts=[
            {"expert": "ann/tea@main", "weight": 0.75},
            {"expert": "ann/cup", "revision": "b" * 40, "weight": -0.5},
        ],
    )


def test_references_are_fetched_and_merged_here_as_folders_are(moerge, published, remote, recipe, tmp_path):
    moerge("merge", write(recipe, method="dare", seed=1), "--out", tmp_path / "folders")
    options = ["--local", "--endpoint", published.url, "--token", "key-1"]
    done = moerge("merge", remote, "--out", tmp_path / "out", *options)
    assert done.status == 0, done.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "folders" / WEIGHTS).read_bytes()
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())["experts"]
    assert {item["expert"]: item["revision"] for item in kept} == {"ann/tea": "a" * 40, "ann/cup": "b" * 40}
    assert all(asked.method == "GET" for asked in published.asked)
    assert not any(asked.path.endswith("README.md") for asked in published.asked)
    # What was fetched is not fetched again.
    published.asked.clear()
    done = moerge("merge", remote, "--out", tmp_path / "again", *options)
    assert (done.status, [asked for asked in published.asked if "resolve" in asked.path]) == (0, [])
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize("changes", [{"method": "soup"}, {"parameters": {"density": 0}}, {"output": {"kind": "cake"}}])
def test_a_wrong_recipe_is_refused_before_an_expert_is_fetched(moerge, published, remote, tmp_path, changes):
    body = json.loads(remote.read_text()) | changes
    remote.write_text(json.dumps(body))
    done = moerge("merge", remote, "--out", tmp_path / "out", "--local", "--endpoint", published.url)
    assert (done.status, published.asked) == (1, [])


def test_a_damaged_expert_is_3_and_merges_nothing(moerge, published, remote, experts, tmp_path):
    data = (experts["cup"] / WEIGHTS).read_bytes()
    published.routes[f"/ann/cup/resolve/{'b' * 40}/{WEIGHTS}"] = stored(data[::-1], "tag")
    done = moerge("merge", remote, "--out", tmp_path / "out", "--local", "--endpoint", published.url)
    assert done.status == 3
    assert "download-damaged" in done.err
    assert not (tmp_path / "out").exists()


def test_folders_and_references_together_are_merged_here_or_refused_with_the_way_out(
    moerge, published, recipe, tmp_path
):
    write(recipe, experts=[{"expert": "./tea", "weight": 1}, {"expert": "ann/cup", "weight": 1}])
    options = ["--out", tmp_path / "out", "--endpoint", published.url]
    done = moerge("merge", recipe, *options)
    assert done.status == 1
    assert "--local" in done.err
    assert published.asked == []
    assert moerge("merge", recipe, *options, "--local").status == 0


@pytest.mark.parametrize(
    ("expert", "pointer"),
    [
        ({"expert": "ann/tea", "revision": 7}, "/experts/0/revision"),
        ({"expert": "ann/tea@main", "revision": "v2"}, "/experts/0/revision"),
        ({"expert": "ann/tea@../x"}, "/experts/0/expert"),
        ({"expert": "ann/../tea"}, "/experts/0/expert"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_the_hub_is_asked(moerge, server, tmp_path, expert, pointer):
    place = write(tmp_path / "recipe.json", experts=[expert])
    done = moerge("merge", place, "--out", tmp_path / "out", "--endpoint", server.url, "--json")
    assert (done.status, done.json["problem"]["errors"][0]["pointer"]) == (1, pointer)
    assert server.asked == []


# By the hub.


def job(state: str, **more) -> dict[str, object]:
    return {"id": JOB, "kind": "merge", "state": state, "progress": 0.5, "message": "Merging 2 experts", **more}


def record(state: str, *, of_job: str, files: dict[str, bytes] | None = None, **more) -> dict[str, object]:
    rows = [{"path": path, "size": len(data), "sha256": hubs.sha256(data)} for path, data in (files or {}).items()]
    report = {"rank": 5, "energy_kept": 0.875, "warnings": ["Rank 5 is small."]} if state == "ready" else {}
    return {"id": MERGE, "digest": "e" * 64, "state": state, "repo": f"merges/{MERGE}", "commit": COMMIT,
            "base_model": "b", "job": job(of_job, **more), "report": report, "files": rows}  # fmt: skip


@pytest.fixture
def merged(server) -> dict[str, bytes]:
    """The scripted hub computes: asked for the merge twice, it is done. What its folder will hold."""
    recipe = {"method": "dare", "parameters": {}, "experts": [{"expert": "ann/tea", "revision": "a", "weight": 0.75}]}
    files = {**tiny.lora(seed=8, rank=5), "recipe.json": json.dumps(recipe).encode(), "lineage.json": b"{}"}
    server.routes["/api/v1/merges"] = [servers.Reply(json.dumps(record("queued", of_job="queued")).encode(), 202)]
    server.routes[f"/api/v1/merges/{MERGE}"] = [as_json(record("ready", of_job="done", files=files))]
    for path, data in files.items():
        server.routes[f"/merges/{MERGE}/resolve/{COMMIT}/{path}"] = stored(data, f"git-of-{path}")
    return files


def test_references_are_merged_by_the_hub_and_every_file_is_verified(moerge, server, merged, remote, tmp_path):
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url, "--token", "key-1")
    assert done.status == 0, done.err
    sent = server.of("/api/v1/merges")[0]
    assert (sent.method, sent.headers["authorization"], sent.headers["content-type"]) == (
        "POST", "Bearer key-1", "application/json")  # fmt: skip
    assert json.loads(sent.body) == {
        "method": "dare",
        "seed": 1,
        "experts": [
            {"expert": "ann/tea", "revision": "main", "weight": 0.75},
            {"expert": "ann/cup", "revision": "b" * 40, "weight": -0.5},
        ],
    }
    found = content(tmp_path / "out")
    assert json.loads(found.pop("report.json"))["energy_kept"] == 0.875
    assert found == merged
    for words in (f"merges/{MERGE} at {COMMIT}", "dare", "0.75 of ann/tea at a", "87.5%"):
        assert words in done.out
    assert "warning: Rank 5 is small." in done.err
    told = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url, "--json").json
    assert (told["by"], told["merge"], told["commit"], told["digest"]) == ("hub", f"merges/{MERGE}", COMMIT, "e" * 64)


@pytest.mark.parametrize("texts", [{"report.json": b"{", "recipe.json": b"[]"}, {"report.json": b'{"warnings": 7, "rank": {}}'},
                                   {"recipe.json": b'{"experts": [7], "parameters": []}'}])  # fmt: skip
def test_texts_of_a_hub_that_are_not_what_they_should_be_are_left_out(
    moerge, server, merged, remote, tmp_path, *, texts
):
    files = merged | texts
    server.routes[f"/api/v1/merges/{MERGE}"] = [as_json(record("ready", of_job="done", files=files))]
    for path, data in texts.items():
        server.routes[f"/merges/{MERGE}/resolve/{COMMIT}/{path}"] = stored(data, "tag")
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url)
    assert (done.status, f"merges/{MERGE}" in done.out) == (0, True)
    assert content(tmp_path / "out").items() >= files.items()


def test_damage_on_the_way_is_3_and_leaves_the_folder_as_it_was(moerge, server, merged, remote, tmp_path):
    server.routes[f"/merges/{MERGE}/resolve/{COMMIT}/{WEIGHTS}"] = stored(merged[WEIGHTS][::-1], "tag")
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url)
    assert done.status == 3
    assert not (tmp_path / "out").exists()


def test_a_merge_that_the_hub_cannot_compute_is_1_with_its_reason(moerge, server, merged, remote, tmp_path):
    failed = record("failed", of_job="failed", error={"detail": "The merge of encoder is not finite."})
    server.routes[f"/api/v1/merges/{MERGE}"] = [as_json(failed)]
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url)
    assert (done.status, "job-failed" in done.err, "not finite" in done.err) == (1, True, True)
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_the_hub_is_told_with_field_and_remedy(moerge, server, remote, tmp_path):
    faults = [{"pointer": "/experts/1/expert", "met": "a yanked expert", "wanted": "one that is listed",
               "remedy": "Choose another."}]  # fmt: skip
    server.routes["/api/v1/merges"] = [problem(409, "experts-incompatible", "ann/cup is yanked.", errors=faults)]
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url, "--json")
    assert done.status == 1
    assert done.json["problem"]["errors"] == faults
    assert "/experts/1/expert: Choose another." in done.err
    assert "ann/cup is yanked." in done.err


def test_a_hub_whose_queue_is_full_is_asked_again(moerge, server, merged, remote, tmp_path):
    full = problem(429, "rate-exceeded", "You have 8 merges waiting.", retry_after=0)
    server.routes["/api/v1/merges"] = [full, *server.routes["/api/v1/merges"]]
    assert moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url).status == 0
    assert len(server.of("/api/v1/merges")) == 2


@pytest.mark.parametrize(
    ("status", "cancel", "words"),
    [
        (202, as_json(job("running")), f"told to stop job {JOB}"),
        (202, problem(403, "not-allowed", "No."), f"goes on with job {JOB}"),
        (202, as_json(job("done")), f"moerge pull merges/{MERGE}"),
        # Somebody else began it: it is theirs.
        (200, None, f"moerge pull merges/{MERGE}"),
    ],
)
def test_who_stops_waiting_stops_what_this_call_has_begun(
    moerge, server, merged, remote, tmp_path, *, status, cancel, words
):
    def interrupt(asked: servers.Asked) -> servers.Reply:
        os.kill(os.getpid(), signal.SIGINT)
        return as_json(record("running", of_job="running"))

    server.routes["/api/v1/merges"] = [servers.Reply(json.dumps(record("queued", of_job="queued")).encode(), status)]
    server.routes[f"/api/v1/merges/{MERGE}"] = interrupt
    if cancel is not None:
        server.routes[f"/api/v1/jobs/{JOB}/cancel"] = [cancel]
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url)
    assert done.status == 130
    assert words in done.err
    assert [asked.method for asked in server.of(f"/api/v1/jobs/{JOB}/cancel")] == ["POST"] * (cancel is not None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"id": "../x"}, {"id": None}, {"commit": "main"}, {"digest": 7}])
def test_an_answer_that_is_no_merge_is_named_as_such(moerge, server, remote, tmp_path, changes):
    server.routes["/api/v1/merges"] = [as_json(record("queued", of_job="queued") | changes)]
    done = moerge("merge", remote, "--out", tmp_path / "out", "--endpoint", server.url)
    assert (done.status, "answer-invalid" in done.err) == (1, True)


def test_a_check_tells_what_the_hub_says(moerge, server, remote):
    answer = {
        "ok": True, "digest": "e" * 64, "repo": f"merges/{MERGE}", "commit": COMMIT, "state": None,
        "recipe": {"method": "dare"}, "warnings": ["ann/cup lacks 1 modules."],
        "experts": [{"expert": "ann/tea", "revision": "a" * 40, "kind": "lora", "rank": 2, "modules": 2}],
        "output": {"kind": "lora", "rank": 5, "bytes": 31_000},
        "cost": {"memory_bytes": 7_000_000, "written_bytes": 31_000, "cpu_seconds": 0.2},
        "licence": {"verdict": "warn", "licence": None},
        "kinship": {"state": "ready", "pairs": [{"first": "ann/tea", "second": "ann/cup", "cosine": 0.25}]},
    }  # fmt: skip
    server.routes["/api/v1/merges/check"] = [as_json(answer)]
    done = moerge("merge", remote, "--check", "--endpoint", server.url)
    assert done.status == 0, done.err
    for words in (
        "dare",
        "ann/tea at aaaa",
        "rank 2",
        "7,000,000",
        "31,000",
        "warn",
        "cosine 0.2500",
        "not asked for yet",
    ):
        assert words in done.out
    assert "ann/cup lacks 1 modules." in done.err
    assert [asked.path for asked in server.asked] == ["/api/v1/merges/check"]
    assert moerge("merge", remote, "--check", "--endpoint", server.url, "--json").json == answer


def test_a_recipe_that_names_contents_is_not_merged_with_others_by_a_hub(moerge, server, merged, tmp_path):
    experts = [{"expert": "ann/tea", "weight": 1, "digest": "1" * 64}]
    place = write(tmp_path / "recipe.json", experts=experts)
    told = {"recipe": {"experts": [{"expert": "ann/tea", "digest": "2" * 64}]}}
    server.routes["/api/v1/merges/check"] = [as_json(told)]
    options = ["--out", tmp_path / "out", "--endpoint", server.url]
    done = moerge("merge", place, *options)
    assert (done.status, "not what the recipe was written for" in done.err) == (1, True)
    assert server.of("/api/v1/merges") == []
    write(place, experts=[{**experts[0], "digest": "2" * 64}])
    assert moerge("merge", place, *options).status == 0
    sent = json.loads(server.of("/api/v1/merges")[0].body)
    assert sent["experts"] == [{"expert": "ann/tea", "revision": "main", "weight": 1}]
