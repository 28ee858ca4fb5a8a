"""On a torch device the same values are kept, and the same products come out: here the processor, and a GPU if any."""

import numpy as np
import pytest
import torch

from moerge.compression import compress_adapter, scales, selection
from moerge.compression.arithmetic import NUMPY
from moerge.compression.on_torch import Torch
from moerge.tensors import files
from tests.unit.compression import samples
from workers import devices


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return Torch(request.param, least_values=0)


def cases():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 50)).astype(np.float32)
    few = np.zeros(300, np.float32)
    few[[3, 70, 299]] = [1, -2, 0.5]
    return {
        "gaussian": values,
        "ties": np.round(values, 1),
        "all equal": np.full(101, -0.25, np.float32),
        "mostly zero": few,
        "nothing": np.zeros(64, np.float32),
        "one": np.array([3], np.float32),
        "empty": np.empty(0, np.float32),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 1.0])
def test_the_same_values_are_kept(device, name, density):
    values = cases()[name]
    before = values.copy()
    order = sorted(range(values.size), key=lambda index: (-abs(values.reshape(-1)[index]), index))
    count = min(values.size, max(1, int(values.size * density + 0.5)))
    expected = sorted(index for index in order[:count] if values.reshape(-1)[index] != 0)
    got = device.keep_largest(values, density)
    assert got.tolist() == expected == selection.keep_largest(values, density).tolist()
    assert got.dtype == np.int64
    np.testing.assert_array_equal(values, before)


def test_inner_products_are_those_of_the_dense_matrices(device):
    rng = np.random.default_rng(1)
    A, B = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 90), (70, 4)))
    A_image, B_image = np.sign(A) * np.float32(0.7), np.sign(B) * np.float32(0.3)
    one, other = (left.astype(np.float64) @ right for left, right in ((B, A), (B_image, A_image)))
    got = device.product(A, B, A_image, B_image)
    assert got.oo == pytest.approx(np.sum(one * one), rel=1e-12)
    assert got.x == pytest.approx(np.sum(one * other), rel=1e-12)
    assert got.hh == pytest.approx(np.sum(other * other), rel=1e-12)
    assert got.x == pytest.approx(scales.product(A, B, A_image, B_image).x, rel=1e-12)


def test_small_tensors_stay_where_they_are():
    class Away(Torch):
        def _moved(self, part):
            raise AssertionError("moved")

    rng = np.random.default_rng(2)
    A, B = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 90), (70, 4)))
    assert Away("meta", least_values=641).product(A, B, A, B) == NUMPY.product(A, B, A, B)
    with pytest.raises(AssertionError, match="moved"):
        Away("cpu", least_values=640).product(A, B, A, B)
    assert Torch("meta", least_values=361).keep_largest(A, 0.1).tolist() == selection.keep_largest(A, 0.1).tolist()


@pytest.mark.parametrize("preset", ["default", "hq", "int4"])
def test_an_adapter_compressed_on_a_device_is_the_same(device, tmp_path, preset):
    tensors = samples.lora(np.random.default_rng(3))
    files.write(tmp_path / "in", tensors)
    config = b'{"peft_type": "LORA"}'
    one = compress_adapter(config, tmp_path / "in", tmp_path / "x", preset=preset, arithmetic=device)
    two = compress_adapter(config, tmp_path / "in", tmp_path / "y", preset=preset)
    assert one.kept == two.kept
    assert one.product_cosine == pytest.approx(two.product_cosine, rel=1e-9)
    for mine, theirs in zip(one.tensors, two.tensors, strict=True):
        assert mine.kept == theirs.kept
        if mine.scale is not None:
            assert mine.scale == pytest.approx(theirs.scale, rel=1e-6)


def test_the_worker_takes_the_processor_where_nothing_else_is():
    assert devices.arithmetic("cpu") is NUMPY
    chosen = devices.arithmetic("auto")
    assert isinstance(chosen, Torch) == torch.cuda.is_available()
    assert isinstance(devices.arithmetic("meta"), Torch)
    with pytest.raises(RuntimeError):
        devices.arithmetic("no-such-device")
