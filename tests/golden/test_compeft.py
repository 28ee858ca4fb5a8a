"""The preset `paper` gives what the authors' function gave: mask and sign exactly, values to 1e-6."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge.compression import published
from moerge.compression.codecs import compeft

FAMILY = "compeft"


def arrays(golden, names):
    stored = load_file(golden.folder / "tensors.safetensors")
    return {name: stored[key] for name, key in names.items()}


def initial_of(golden):
    if "base" in golden.case:
        return arrays(golden, golden.case["base"])
    return float(golden.case.get("initial", 0.0))


def start(initial, name):
    return initial[name] if isinstance(initial, dict) else np.float32(initial)


def density_of(golden):
    percent = golden.case["k_percent"]
    return percent / 100 if percent > 1 else percent


def mode_of(golden):
    factor = golden.case["replace_factor"]
    return {-1: published.PRUNE, -2: published.STC}.get(factor, factor)


def expected_of(golden, inputs, initial):
    """Outputs of the release. Where it raises, the non-zero entries are kept at alpha standard deviations."""
    if "error" not in golden.case:
        return arrays(golden, golden.case["outputs"])
    scale = np.float32(golden.case["replace_factor"] * golden.case["std"])
    return {
        name: start(initial, name) + scale * np.sign(values - start(initial, name)) for name, values in inputs.items()
    }


def assert_same(got, expected, initial):
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == wanted.shape
        change, wanted_change = (np.sign(values - start(initial, name)) for values in (got[name], wanted))
        np.testing.assert_array_equal(change, wanted_change, err_msg=f"mask or sign of {name}")
        np.testing.assert_allclose(got[name], wanted, rtol=1e-6, atol=0, err_msg=name)


def test_the_release_is_repeated(golden):
    """Its function, its statistics, and its result after a trip through a file."""
    check_function(golden)
    if density_of(golden) < 1:
        check_statistics(golden)
        check_file(golden)


def check_function(golden):
    inputs, initial = arrays(golden, golden.case["inputs"]), initial_of(golden)
    got = published.compress(inputs, density=density_of(golden), mode=mode_of(golden), initial=initial)
    assert_same(got, expected_of(golden, inputs, initial), initial)


def check_statistics(golden):
    case, initial = golden.case, initial_of(golden)
    inputs = arrays(golden, case["inputs"])
    assert sum(values.size for values in inputs.values()) == case["numel"]
    vector = [inputs[name] - start(initial, name) for name in sorted(inputs)]
    plan = published.plan(lambda: vector, density=density_of(golden), mode=mode_of(golden))
    assert plan.sigma == pytest.approx(case["std"], rel=1e-6)
    kept = sum(plan.keep(values).size for values in vector)
    if case.get("kept") is not None:
        assert kept == case["kept"]
    else:
        assert kept == sum(np.count_nonzero(values) for values in vector)
    # The index gives a pruned case the mean kept magnitude as its scale, although nothing is scaled.
    if case.get("scale") is not None and plan.scale is not None:
        assert plan.scale == pytest.approx(case["scale"], rel=1e-6)
    if case.get("sum") is not None:
        out = published.compress(inputs, density=density_of(golden), mode=mode_of(golden), initial=initial)
        magnitude = sum(float(np.abs(values).sum(dtype=np.float64)) for values in out.values())
        total = sum(float(values.sum(dtype=np.float64)) for values in out.values())
        assert total == pytest.approx(case["sum"], abs=2e-6 * magnitude)


def check_file(golden):
    inputs, initial = arrays(golden, golden.case["inputs"]), initial_of(golden)
    mode = mode_of(golden)
    parameters = {"preset": "paper", "density": density_of(golden)}
    if mode == published.STC:
        parameters["scale_rule"] = "stc"
    elif mode != published.PRUNE:
        parameters["alpha"] = mode
    base = {name: initial[name] if isinstance(initial, dict) else int(initial) for name in inputs}
    data = compeft.encode(inputs, parameters, initial=base)
    got = compeft.decode(data, initial=base.__getitem__)
    expected = expected_of(golden, inputs, initial)
    if mode == published.PRUNE:
        # Pruned magnitudes are not ternary: the file keeps their mask and signs under the scale of the paper.
        for name, wanted in expected.items():
            np.testing.assert_array_equal(np.sign(got[name]), np.sign(wanted))
        return
    assert_same(got, expected, initial)
