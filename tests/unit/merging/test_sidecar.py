"""Statistics beside an adapter: what is read back, and what is refused by name."""

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moerge.errors import StatisticsInvalid
from moerge.merging import sidecar
from moerge.merging.sidecar import About
from moerge.merging.sources import Factors
from moerge.merging.statistics import Gram
from moerge.tensors import header

QUERY, UP = "encoder.layer.0.query", "encoder.layer.0.up"
SHAPES = {QUERY: (4, 6), UP: (8, 4)}
METADATA = {"examples": "256", "tokens": "4096", "label_policy": "empirical"}


def spectrum(size: int, *, seed: int, rank: int) -> np.ndarray:
    """A Gram matrix with `rank` leading directions and a small diagonal."""
    noise = np.random.default_rng(seed)
    inputs = noise.normal(size=(rank, size)) * np.linspace(5, 1, rank)[:, None]
    return inputs.T @ inputs / rank + np.diag(noise.uniform(0.01, 0.02, size))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Every kind in every form, written by the reference library."""
    noise = np.random.default_rng(5)
    return {
        f"{QUERY}.fisher_diag": noise.uniform(size=(4, 6)).astype(np.float32),
        f"{UP}.fisher_diag.rows": noise.uniform(size=8).astype(np.float32),
        f"{UP}.fisher_diag.columns": noise.uniform(size=4).astype(np.float32),
        f"{QUERY}.gram_in": spectrum(6, seed=1, rank=6).astype(np.float16).astype(np.float32),
        f"{UP}.gram_in.vectors": np.eye(2, 4, dtype=np.float16),
        f"{UP}.gram_in.values": np.array([3, 2], np.float32),
        f"{UP}.gram_in.rest": np.array([1, 2, 3, 4], np.float32),
        f"{QUERY}.gram_out": np.eye(4),
        f"{UP}.coefficients": np.array(0.25),
        "coefficients": np.array([0.5]),
        "loss": np.array(1.5, np.float32),
    }


def write(path, arrays, **metadata):
    """A file whose metadata name the kinds of these arrays, unless told otherwise."""
    present = sorted({kind for name in arrays for kind in sidecar.KINDS if f".{kind}" in f".{name}"})
    said = {"kinds": ",".join(present), **METADATA, **metadata}
    save_file(arrays, path, metadata={name: value for name, value in said.items() if value is not None})
    return path


def examined(path):
    found = header.read(path)
    about = sidecar.check(found, modules=SHAPES, shapes=SHAPES)
    sidecar.verify(path)
    return about


def test_every_kind_is_read_back_in_the_form_that_methods_take(tmp_path, arrays) -> None:
    path = write(tmp_path / sidecar.FILE, arrays)
    assert examined(path) == About(examples=256, tokens=4096, label_policy="empirical")
    assert sidecar.kinds(header.read(path)) == ("coefficients", "fisher_diag", "gram_in", "gram_out", "loss")
    found = sidecar.load(path)
    np.testing.assert_array_equal(found["fisher_diag"][QUERY], arrays[f"{QUERY}.fisher_diag"])
    rows, columns = arrays[f"{UP}.fisher_diag.rows"], arrays[f"{UP}.fisher_diag.columns"]
    np.testing.assert_allclose(found["fisher_diag"][UP].delta(), np.outer(rows, columns), rtol=1e-6)
    np.testing.assert_array_equal(found["gram_in"][QUERY], arrays[f"{QUERY}.gram_in"])
    np.testing.assert_allclose(found["gram_in"][UP].dense(), np.diag([3 + 1, 2 + 2, 3, 4]))
    assert found["gram_out"][QUERY].dtype == np.float64
    assert dict(found["coefficients"]) == {"*": 0.5, UP: 0.25}
    assert dict(found["loss"]) == {"*": 1.5}


WRONG = {
    "a module that the adapter lacks": ({"encoder.layer.9.query.gram_in": np.eye(6)}, "encoder.layer.9.query.gram_in"),
    "a kind that nobody knows": ({f"{QUERY}.hessian": np.eye(6)}, f"{QUERY}.hessian"),
    "a kind without a module": ({"gram_in": np.eye(6)}, "gram_in"),
    "a part that nobody knows": ({f"{QUERY}.gram_in.bias": np.ones(6)}, f"{QUERY}.gram_in.bias"),
    "information of the shape turned over": ({f"{QUERY}.fisher_diag": np.ones((6, 4))}, f"{QUERY}.fisher_diag"),
    "information as a vector": ({f"{QUERY}.fisher_diag": np.ones(24)}, f"{QUERY}.fisher_diag"),
    "information without its columns": ({f"{QUERY}.fisher_diag.rows": np.ones(4)}, f"{QUERY}.fisher_diag.rows"),
    "rows and columns changed for each other": (
        {f"{QUERY}.fisher_diag.rows": np.ones(6), f"{QUERY}.fisher_diag.columns": np.ones(4)},
        f"{QUERY}.fisher_diag.columns",
    ),
    "a Gram matrix of the outputs called one of inputs": ({f"{QUERY}.gram_in": np.eye(4)}, f"{QUERY}.gram_in"),
    "a Gram matrix of the inputs called one of outputs": ({f"{QUERY}.gram_out": np.eye(6)}, f"{QUERY}.gram_out"),
    "a Gram matrix both whole and in parts": (
        {f"{QUERY}.gram_in": np.eye(6), f"{QUERY}.gram_in.rest": np.ones(6)},
        f"{QUERY}.gram_in",
    ),
    "more directions than there are": (
        {
            f"{QUERY}.gram_in.vectors": np.ones((7, 6)),
            f"{QUERY}.gram_in.values": np.ones(7),
            f"{QUERY}.gram_in.rest": np.ones(6),
        },
        f"{QUERY}.gram_in.rest",
    ),
    "fewer values than directions": (
        {
            f"{QUERY}.gram_in.vectors": np.ones((3, 6)),
            f"{QUERY}.gram_in.values": np.ones(2),
            f"{QUERY}.gram_in.rest": np.ones(6),
        },
        f"{QUERY}.gram_in.rest",
    ),
    "two losses": ({"loss": np.ones(2)}, "loss"),
    "information below zero": ({f"{QUERY}.fisher_diag": -np.eye(4, 6)}, f"{QUERY}.fisher_diag"),
    "not a number": ({f"{QUERY}.fisher_diag": np.full((4, 6), np.nan)}, f"{QUERY}.fisher_diag"),
    "an infinite loss": ({"loss": np.array(np.inf)}, "loss"),
    "a direction below zero": (
        {
            f"{QUERY}.gram_in.vectors": np.eye(1, 6),
            f"{QUERY}.gram_in.values": np.array([-1.0]),
            f"{QUERY}.gram_in.rest": np.full(6, 2.0),
        },
        f"{QUERY}.gram_in.rest",
    ),
    "a diagonal below zero": ({f"{QUERY}.gram_in": np.diag([1.0, 1, 1, 1, 1, -1])}, f"{QUERY}.gram_in"),
    "two halves that differ": ({f"{QUERY}.gram_in": np.eye(6) + np.eye(6, k=1)}, f"{QUERY}.gram_in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_statistics_of_the_adapter_is_refused_by_tensor(case, tmp_path) -> None:
    arrays, pointer = WRONG[case]
    with pytest.raises(StatisticsInvalid) as refused:
        examined(write(tmp_path / sidecar.FILE, arrays))
    assert refused.value.pointer == pointer
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"kinds": None}, "kinds"),
        ({"kinds": "gram_in"}, "kinds"),
        ({"examples": None}, "examples"),
        ({"examples": "0"}, "examples"),
        ({"examples": "-3"}, "examples"),
        ({"tokens": None}, "tokens"),
        ({"label_policy": None}, "label_policy"),
        ({"label_policy": "guessed"}, "label_policy"),
        ({"dataset_digest": "abc"}, "dataset_digest"),
        ({"base_digest": "A" * 64}, "base_digest"),
    ],
)
def test_metadata_that_do_not_hold_are_refused_by_field(changes, pointer, tmp_path, arrays) -> None:
    with pytest.raises(StatisticsInvalid) as refused:
        examined(write(tmp_path / sidecar.FILE, arrays, **changes))
    assert refused.value.pointer == f"__metadata__/{pointer}"


def test_a_large_whole_gram_matrix_is_refused_before_a_value_is_read() -> None:
    side = 10_000
    info = header.TensorInfo(f"{QUERY}.gram_in", "F16", (side, side), 0, 2 * side * side)
    said = {**METADATA, "kinds": "gram_in"}
    claimed = header.Header(said, {info.name: info}, 512, 512 + info.end, header.Limits())
    with pytest.raises(StatisticsInvalid, match="vectors"):
        sidecar.check(claimed)


def test_what_is_saved_is_laid_out_as_announced(tmp_path) -> None:
    path = tmp_path / sidecar.FILE
    gram = sidecar.compact_gram(spectrum(40, seed=2, rank=6), directions=5)
    given = {
        "gram_in": {UP: gram},
        "fisher_diag": {QUERY: sidecar.compact_fisher(np.arange(24, dtype=np.float32).reshape(4, 6))},
        "loss": {"*": 0.1},
    }
    sidecar.save(path, given, about=About(examples=3, tokens=9, label_policy="true", dataset_digest="a" * 64))
    found = load_file(path)
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        f"{UP}.gram_in.vectors": ("float16", (5, 40)),
        f"{UP}.gram_in.values": ("float32", (5,)),
        f"{UP}.gram_in.rest": ("float32", (40,)),
        f"{QUERY}.fisher_diag.rows": ("float32", (4,)),
        f"{QUERY}.fisher_diag.columns": ("float32", (6,)),
        "loss": ("float64", ()),
    }
    assert header.read(path).metadata == {
        "kinds": "fisher_diag,gram_in,loss",
        "examples": "3",
        "tokens": "9",
        "label_policy": "true",
        "dataset_digest": "a" * 64,
    }
    with pytest.raises(StatisticsInvalid, match="below zero"):
        sidecar.save(path, {"fisher_diag": {QUERY: -np.ones((4, 6))}}, about=About(examples=3, label_policy="true"))


def test_information_in_few_numbers_has_the_sums_of_all_of_it() -> None:
    fisher = np.random.default_rng(3).exponential(size=(7, 5))
    kept = sidecar.compact_fisher(fisher)
    np.testing.assert_allclose(kept.delta().sum(axis=0), fisher.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(kept.delta().sum(axis=1), fisher.sum(axis=1), rtol=1e-5)
    assert not sidecar.compact_fisher(np.zeros((2, 3))).delta().any()


@pytest.mark.parametrize("directions", [6, 30])
def test_few_directions_keep_the_leading_ones_and_the_diagonal(directions) -> None:
    gram = spectrum(40, seed=4, rank=6)
    kept = sidecar.compact_gram(gram, directions=directions)
    assert isinstance(kept, Gram)
    np.testing.assert_allclose(kept.diagonal(), gram.diagonal(), rtol=1e-3)
    np.testing.assert_allclose(kept.dense(), gram, atol=0.004 * gram.max())
    values = np.linalg.eigvalsh(gram)[::-1]
    np.testing.assert_allclose(kept.values[:6], values[:6], rtol=1e-3)


def test_the_compact_form_of_4096_takes_about_a_mebibyte() -> None:
    gram = Gram(np.zeros((sidecar.DIRECTIONS, 4096), np.float16), np.zeros(128, np.float32), np.zeros(4096, np.float32))
    assert sum(part.nbytes for part in (gram.vectors, gram.values, gram.rest)) < 1.05 * 2**20


def test_memory_holds_one_module_at_a_time(tmp_path) -> None:
    """Thirty matrices of 256 KiB: looking at all of them keeps no more than a few in memory."""
    arrays = {f"layer.{n}.gram_in": np.eye(256, dtype=np.float32) for n in range(30)}
    path = write(tmp_path / sidecar.FILE, arrays)
    tracemalloc.start()
    sidecar.verify(path)
    found = sidecar.load(path)["gram_in"]
    assert len(found) == sum(module in found for module in found) == 30
    for module in found:
        assert found[module].shape == (256, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**18


def test_factors_of_a_saved_file_are_what_fisher_merging_takes(tmp_path) -> None:
    path = tmp_path / sidecar.FILE
    given = Factors(np.array([[1.0], [3.0]], np.float32), np.array([[2.0, 5.0]], np.float32))
    sidecar.save(path, {"fisher_diag": {"m": given}}, about=About(examples=1, label_policy="true"))
    found = sidecar.load(path)["fisher_diag"]["m"]
    assert isinstance(found, Factors)
    np.testing.assert_array_equal(found.delta(), [[2, 5], [6, 15]])
