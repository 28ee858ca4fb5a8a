"""Statistics beside experts: taken at the door when they fit, and merges by them equal to the formulas in numpy."""

import json
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load, save

from registry.errors import UploadInvalid
from registry.models import Merge, Revision
from registry.services import merges
from tests import tiny
from tests.integration import hf
from tests.integration.merges import compute, ready, result

pytestmark = pytest.mark.django_db

STATS, WEIGHTS, CONFIG = "stats.safetensors", "adapter_model.safetensors", "adapter_config.json"
SIZE = 8
MODULES = (tiny.QUERY, tiny.VALUE)
SHARES = {"first": 0.7, "second": 0.3}
LOSSES = {"first": 1.25, "second": 0.5}
COEFFICIENTS = {"first": {"": 0.4, tiny.VALUE: 1.5}, "second": {tiny.QUERY: 0.2, tiny.VALUE: 0.9}}


@pytest.fixture
def ann():
    return hf.person("ann", ["read", "write", "merge"])


def gram(seed: int) -> np.ndarray:
    inputs = np.random.default_rng(seed).normal(size=(50, SIZE)) * np.geomspace(2, 0.7, SIZE)
    return inputs.T @ inputs / 50


def known() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What is known of each expert, kind by kind and module by module, dense."""
    noise, found = np.random.default_rng(1), {}
    for seed, name in enumerate(SHARES):
        found[name] = {
            "fisher_diag": {module: noise.exponential(1e-3, size=(SIZE, SIZE)) for module in MODULES},
            "gram_in": {module: gram(10 * seed + n) for n, module in enumerate(MODULES)},
            "gram_out": {module: gram(100 + 10 * seed + n) for n, module in enumerate(MODULES)},
        }
    # Of the second expert one kind of each sort is kept in few numbers.
    rows, columns = noise.exponential(size=SIZE), noise.exponential(1e-3, size=SIZE)
    found["second"]["fisher_diag"][tiny.QUERY] = np.outer(rows, columns)
    vectors = np.linalg.qr(noise.normal(size=(SIZE, SIZE)))[0][:3]
    values, rest = np.array([3.0, 2.0, 1.0]), noise.uniform(0.1, 0.2, SIZE)
    found["second"]["gram_in"][tiny.QUERY] = vectors.T @ np.diag(values) @ vectors + np.diag(rest)
    found["few"] = {
        f"{tiny.QUERY}.fisher_diag": {"rows": rows, "columns": columns},
        f"{tiny.QUERY}.gram_in": {"vectors": vectors, "values": values, "rest": rest},
    }
    return found


@cache  # the reference writer orders metadata at random
def sidecar(name: str, *, kinds: tuple[str, ...] = ("fisher_diag", "gram_in", "gram_out", "loss", "coefficients")):
    """The bytes of one expert's statistics in float64, written by the reference library."""
    everything, arrays = known(), {}
    few = everything["few"] if name == "second" else {}
    for kind in kinds:
        for module, values in everything[name].get(kind, {}).items():
            key = f"{module}.{kind}"
            arrays |= {f"{key}.{part}": found for part, found in few[key].items()} if key in few else {key: values}
    if "loss" in kinds:
        arrays["loss"] = np.array(LOSSES[name])
    if "coefficients" in kinds:
        arrays |= {f"{m}.coefficients".lstrip("."): np.array(c) for m, c in COEFFICIENTS[name].items()}
    said = {"kinds": ",".join(kinds), "examples": "256", "tokens": "4096", "label_policy": "true"}
    return save(arrays, metadata=said)


def adapter(seed: int, **files: bytes) -> dict[str, bytes]:
    tree = tiny.lora(seed=seed, rank=2 + seed, alpha=3 + seed, modules=MODULES, size=SIZE)
    return {**tree, **{path.replace("_safetensors", ".safetensors"): data for path, data in files.items()}}


@pytest.fixture
def pair(ann):
    return [
        ready(ann[0], name, adapter(seed, stats_safetensors=sidecar(name))) for seed, name in enumerate(SHARES)
    ]  # fmt: skip


def deltas(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    config, tensors = json.loads(files[CONFIG]), load(files[WEIGHTS])
    found = {}
    for module in MODULES:
        a, b = (tensors[f"base_model.model.{module}.lora_{f}.weight"].astype(np.float64) for f in "AB")
        found[module] = config["lora_alpha"] / config["r"] * (b @ a)
    return found


def merged(ann, method: str, **parameters) -> dict[str, np.ndarray]:
    """What the worker makes of the pair, as dense deltas."""
    body = {
        "method": method,
        "parameters": parameters,
        "experts": [{"expert": f"ann/{name}", "weight": weight} for name, weight in SHARES.items()],
        "output": {"kind": "delta"},
    }
    merge = compute(merges.register(user=ann[0], body=body)[0])
    assert merge.state == Merge.State.READY, merge.jobs.get().error
    found = load(result(merge)["delta.safetensors"])
    return {module: found[f"{module}.weight"] for module in MODULES}


def shrunk(matrix: np.ndarray, share: float) -> np.ndarray:
    return share * matrix + (1 - share) * np.diag(np.diag(matrix))


def terms(kind: str, module: str) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Weight, delta and statistics of each expert for one module."""
    return [
        (weight, deltas(adapter(seed))[module], known()[name][kind][module])
        for seed, (name, weight) in enumerate(SHARES.items())
    ]


def by_fisher(module: str) -> np.ndarray:
    found = [(w * (fisher + 1e-4), delta) for w, delta, fisher in terms("fisher_diag", module)]
    return sum(share * delta for share, delta in found) / sum(share for share, _ in found)


def by_regmean(module: str) -> np.ndarray:
    found = [(w * shrunk(matrix, 0.8), delta) for w, delta, matrix in terms("gram_in", module)]
    return sum(delta @ matrix for matrix, delta in found) @ np.linalg.inv(sum(matrix for matrix, _ in found))


def by_mats(module: str) -> np.ndarray:
    """The normal equations of both sides, as one system in the entries of the delta."""
    pairs = zip(terms("gram_in", module), terms("gram_out", module), strict=True)
    system, goal = np.zeros((SIZE**2, SIZE**2)), np.zeros((SIZE, SIZE))
    for (weight, delta, inner), (_, _, outer) in pairs:
        left, right = shrunk(outer, 0.8), shrunk(inner, 0.8)
        system += weight * np.kron(left, right)
        goal += weight * left @ delta @ right
    return np.linalg.solve(system, goal.ravel()).reshape(SIZE, SIZE)


def by_loss(module: str) -> np.ndarray:
    votes = {name: weight * np.exp(-LOSSES[name] / 0.5) for name, weight in SHARES.items()}
    parts = [votes[name] * deltas(adapter(seed))[module] for seed, name in enumerate(SHARES)]
    return sum(parts) / sum(votes.values())


def by_coefficients(module: str) -> np.ndarray:
    found = np.zeros((SIZE, SIZE))
    for seed, (name, weight) in enumerate(SHARES.items()):
        coefficient = COEFFICIENTS[name].get(module, COEFFICIENTS[name].get("", 0.0))
        found += 2.0 * weight * min(coefficient, 1.0) * deltas(adapter(seed))[module]
    return found


FORMULAS = {
    "fisher": ({"floor": 1e-4}, by_fisher, 1e-5),
    "regmean": ({"off_diagonal": 0.8}, by_regmean, 1e-4),
    "mats": ({"off_diagonal": 0.8, "objective": "input_output", "iterations": 2000}, by_mats, 2e-3),
    "lm_cocktail": ({"temperature": 0.5}, by_loss, 1e-5),
    "adamerging": ({"scale": 2.0}, by_coefficients, 1e-5),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_a_merge_by_statistics_is_the_formula(method, ann, pair) -> None:
    parameters, formula, tolerance = FORMULAS[method]
    found = merged(ann, method, **parameters)
    for module in MODULES:
        wanted = formula(module)
        np.testing.assert_allclose(found[module], wanted, atol=tolerance * np.abs(wanted).max())
        mean = sum(weight * deltas(adapter(seed))[module] for seed, weight in enumerate(SHARES.values()))
        assert np.linalg.norm(wanted - mean) > 0.05 * np.linalg.norm(mean), "the statistics count for nothing"


def test_the_revision_knows_which_kinds_come_with_it_and_the_merge_which_file(ann, pair) -> None:
    revision = Revision.objects.get(expert=pair[0])
    digest = hf.sha256(sidecar("first"))
    assert revision.facts["statistics"] == {
        "kinds": ["coefficients", "fisher_diag", "gram_in", "gram_out", "loss"],
        "sha256": digest,
    }
    body = {"method": "fisher", "experts": [{"expert": f"ann/{name}"} for name in SHARES]}
    merge = compute(merges.register(user=ann[0], body=body)[0])
    record = json.loads(result(merge)["lineage.json"])
    told = {row["expert"]: row["statistics_sha256"] for row in record["parents"]}
    assert told == {"ann/first": digest, "ann/second": hf.sha256(sidecar("second"))}


def test_an_expert_without_the_kind_is_refused_by_name(ann, pair) -> None:
    ready(ann[0], "third", adapter(3, stats_safetensors=sidecar("first", kinds=("fisher_diag",))))
    ready(ann[0], "fourth", adapter(4))
    for other, method in {"third": "regmean", "fourth": "fisher"}.items():
        body = {"method": method, "experts": [{"expert": "ann/first"}, {"expert": f"ann/{other}"}]}
        refused = ann[1].json("POST", "/api/v1/merges", body)
        assert refused.status_code == 409, refused.json()
        assert f"ann/{other}" in refused.json()["detail"]
        assert refused.json()["errors"][0]["pointer"].startswith("/experts/")
    assert not Merge.objects.exists()


def changed(**arrays: np.ndarray) -> bytes:
    tensors = load(sidecar("first")) | {name.replace("__", "."): array for name, array in arrays.items()}
    present = ["coefficients", "fisher_diag", "gram_in", "gram_out", "loss"]
    said = {"kinds": ",".join(present), "examples": "256", "tokens": "4096", "label_policy": "true"}
    return save(tensors, metadata=said)


REFUSED = {
    "a module that the adapter lacks": ({"layer__gram_in": np.eye(SIZE)}, "/layer.gram_in"),
    "a kind that nobody knows": ({f"{tiny.QUERY}__hessian": np.eye(SIZE)}, f"/{tiny.QUERY}.hessian"),
    "the shape of another module": ({f"{tiny.QUERY}__gram_in": np.eye(SIZE + 1)}, f"/{tiny.QUERY}.gram_in"),
    "information below zero": (
        {f"{tiny.QUERY}__fisher_diag": np.full((SIZE, SIZE), -1.0)},
        f"/{tiny.QUERY}.fisher_diag",
    ),
    "not a number": ({f"{tiny.QUERY}__fisher_diag": np.full((SIZE, SIZE), np.nan)}, f"/{tiny.QUERY}.fisher_diag"),
    "integers": ({f"{tiny.QUERY}__gram_in": np.eye(SIZE, dtype=np.int64)}, f"/{tiny.QUERY}.gram_in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_statistics_that_do_not_fit_are_refused_and_nothing_is_committed(case, ann) -> None:
    arrays, pointer = REFUSED[case]
    with pytest.raises(UploadInvalid) as refused:
        hf.expert(ann[0], "bad", adapter(0, stats_safetensors=changed(**arrays)))
    assert refused.value.faults[0].pointer == f"/{STATS}{pointer}"
    assert not Revision.objects.exists()


def test_statistics_may_come_later_and_are_held_against_the_adapter_that_is_there(ann) -> None:
    made = hf.expert(ann[0], "later", adapter(0))
    hf.put(ann[0], made, {STATS: sidecar("first")})
    head = Revision.objects.filter(expert=made).order_by("-pk")[0]
    assert head.facts["statistics"]["sha256"] == hf.sha256(sidecar("first"))
    with pytest.raises(UploadInvalid, match="no module"):
        hf.put(ann[0], made, {key: tiny.lora(modules=(tiny.QUERY,), size=SIZE)[key] for key in (CONFIG, WEIGHTS)})
    other = hf.put(ann[0], made, {WEIGHTS: tiny.lora(seed=9, rank=2, modules=MODULES, size=SIZE)[WEIGHTS]})
    assert any("gathered on other weights" in warning for warning in other.facts["warnings"])
    early = hf.expert(ann[0], "early", {STATS: sidecar("first")})
    assert "statistics" not in Revision.objects.get(expert=early).facts
