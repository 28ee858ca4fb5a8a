"""Every output of a merge, computed by the worker's own function from files of the hub: read back by numpy alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from moerge.compression import decompress
from registry.models import BaseModel, Job, Merge
from registry.services import base_weights, merges
from tests import tiny
from tests.integration.test_merges import FIRST, SECOND, ann, compute, deltas, pair, ready, recipe, result

pytestmark = pytest.mark.django_db
__all__ = ["ann", "pair"]

WEIGHTS = {f"{module}.weight": np.full((384, 384), 0.5, np.float32) for module in (tiny.QUERY, tiny.VALUE)}
NORM = "encoder.layer.0.output.LayerNorm.weight"


@pytest.fixture
def base(ann, settings, tmp_path):
    """Weights of the base below HUB_BASES_DIR, known to the hub."""
    settings.HUB_BASES_DIR = tmp_path / "bases"
    write(settings.HUB_BASES_DIR / "minilm", WEIGHTS | {NORM: np.arange(384, dtype=np.float16)})
    row, _ = BaseModel.objects.get_or_create(name=tiny.BASE)
    return base_weights.add(user=None, base=row, folder="minilm")


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')


def merged(user, **output) -> Merge:
    return compute(merges.register(user=user, body=recipe(output=output))[0])


def summed() -> dict[str, np.ndarray]:
    first, second = deltas(FIRST), deltas(SECOND)
    return {
        f"{tiny.QUERY}.weight": 0.7 * first[tiny.QUERY],
        f"{tiny.VALUE}.weight": 0.7 * first[tiny.VALUE] + 0.3 * second[tiny.VALUE],
    }


def test_a_dense_delta_is_the_weighted_sum_under_the_names_of_the_base(ann, pair) -> None:
    merge = merged(ann[0], kind="delta")
    files = result(merge)
    assert {"delta.safetensors", "delta.json", "report.json", "recipe.json"} < set(files)
    found = load(files["delta.safetensors"])
    assert found.keys() == summed().keys()
    for name, wanted in summed().items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    assert (merge.report["rank"], merge.report["kind"]) == (None, "delta")


def test_a_ternary_delta_decodes_and_the_report_tells_what_it_kept(ann, pair, tmp_path) -> None:
    merge = merged(ann[0], kind="ternary", density=0.2)
    files = result(merge)
    assert "delta.safetensors" not in files
    (tmp_path / "delta.compeft").write_bytes(files["delta.compeft"])
    found = load(decompress(tmp_path / "delta.compeft", tmp_path / "out").read_bytes())
    across = image = whole = lost = 0.0
    for name, wanted in summed().items():
        lost += float(((found[name] - wanted) ** 2).sum())
        assert (found[name] != 0).mean() == pytest.approx(0.2, abs=1e-3)
        assert len(np.unique(found[name])) == 3
        across += float((found[name] * wanted).sum())
        image, whole = image + float((found[name] ** 2).sum()), whole + float((wanted**2).sum())
    told = merge.report["ternary"]
    assert told["cosine"] == pytest.approx(across / (image * whole) ** 0.5, rel=1e-4)
    assert told["bytes"] == len(files["delta.compeft"]) < told["dense_bytes"] / 20
    assert told["density"] == 0.2
    share = 1 - lost / whole
    assert 0.1 < share < 0.9
    assert merge.report["energy_kept"] == pytest.approx(share, rel=1e-4)
    assert any(f"Ternary at density 0.2 keeps {share:.1%}" in text for text in merge.report["warnings"])


def test_full_weights_are_those_of_the_base_with_the_sum_added(ann, pair, base) -> None:
    merge = merged(ann[0], kind="full")
    assert json.loads(merge.recipe.canonical)["base_weights"] == base.weights["digest"]
    files = result(merge)
    found = load(files["model.safetensors"])
    for name, wanted in summed().items():
        np.testing.assert_allclose(found[name], 0.5 + wanted, atol=1e-5)
    assert found[NORM].tobytes() == np.arange(384, dtype=np.float16).tobytes()
    assert json.loads(files["config.json"]) == {"model_type": "bert"}


@pytest.mark.parametrize("change", ["size", "digest"])
def test_weights_of_the_base_that_changed_since_are_a_failure_that_says_what_to_do(
    ann, pair, base, settings, change
) -> None:
    merge, _ = merges.register(user=ann[0], body=recipe(output={"kind": "full"}))
    more = {"more": np.zeros(8, np.float32)} if change == "size" else {}
    other = {name: values + 1 for name, values in WEIGHTS.items()} | {NORM: np.zeros(384, np.float16)} | more
    write(settings.HUB_BASES_DIR / "minilm", other)
    if change == "digest":
        base_weights.add(user=None, base=base, folder="minilm")
    compute(merge)
    job = Job.objects.get(merge=merge)
    assert job.state == Job.State.FAILED
    assert merge.state == Merge.State.FAILED
    assert "add_base_weights" in json.dumps(job.error)
    assert not result(merge)


def test_values_that_do_not_fit_are_the_recipes_failure_and_none_of_the_hub(ann, pair) -> None:
    body = recipe(output={"kind": "delta", "dtype": "float16"})
    body["experts"] = [{**one, "weight": 1e6} for one in body["experts"]]
    compute(merges.register(user=ann[0], body=body)[0])
    error = Job.objects.get(kind="merge").error
    assert (error["code"], error["status"]) == ("experts-incompatible", 409)
    assert error["errors"][0]["pointer"] == "/output/dtype"


def test_a_share_of_energy_decides_the_rank(ann, pair) -> None:
    merge = merged(ann[0], rank={"energy": 0.9})
    needed = {}
    for name, delta in summed().items():
        kept = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2) / np.linalg.norm(delta) ** 2
        needed[name.removesuffix(".weight")] = int(np.flatnonzero(kept >= 0.9)[0]) + 1
    files = result(merge)
    told = json.loads(files["report.json"])
    assert {module["name"]: module["rank"] for module in told["modules"]} == needed
    assert json.loads(files["adapter_config.json"])["r"] == merge.report["rank"] == max(needed.values())
    assert told["energy_kept"] == merge.report["energy_kept"] >= 0.9


def test_the_card_holds_no_figure_that_was_computed(ann, pair) -> None:
    """So that it can be told before the merge is made, and again when its weights were removed."""
    merge = merged(ann[0], rank=1)
    files = result(merge)
    assert merge.report["energy_kept"] < 0.9
    assert "keeps" not in files["README.md"].decode()
    assert any("Rank 1 keeps" in text for text in json.loads(files["report.json"])["warnings"])


def test_ia3_experts_become_ia3(ann) -> None:
    gains = {}
    for number, name in enumerate(("first", "second")):
        gains[name] = np.random.default_rng(number).normal(1, 0.3, size=(384, 1)).astype(np.float32)
        config = {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []}
        ready(ann[0], name, {
            "README.md": tiny.card(),
            "adapter_config.json": json.dumps(config | {"base_model_name_or_path": tiny.BASE}).encode(),
            "adapter_model.safetensors": tiny.dump({f"base_model.model.{tiny.QUERY}.ia3_l": gains[name]}),
        })  # fmt: skip
    merge = compute(merges.register(user=ann[0], body=recipe())[0])
    found = load(result(merge)["adapter_model.safetensors"])[f"base_model.model.{tiny.QUERY}.ia3_l"]
    wanted = 1 + 0.7 * (gains["first"] - 1) + 0.3 * (gains["second"] - 1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert merge.report["kind"] == "ia3"
