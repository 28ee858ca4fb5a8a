"""Dense task vectors as ternary: what is decoded by the container's own reader, against numpy."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moerge.compression import compress_delta, decompress
from moerge.errors import AdapterInvalid

SHAPES = {"layers.0.q.weight": (64, 48), "layers.0.q.bias": (64,), "layers.1.conv.weight": (8, 4, 3, 3)}


@pytest.fixture
def delta(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_t(3, size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "delta.safetensors")
    return tensors


def test_every_tensor_is_its_largest_values_as_signs_of_one_scale(tmp_path, delta):
    report = compress_delta(tmp_path / "delta.safetensors", tmp_path / "delta.compeft", density=0.25, base_model="a/b")
    found = load_file(decompress(tmp_path / "delta.compeft", tmp_path / "out"))
    assert found.keys() == delta.keys()
    across = image = whole = 0.0
    for name, values in delta.items():
        kept = np.argsort(np.abs(values), axis=None)[-values.size // 4 :]
        signs = np.zeros(values.size)
        signs[kept] = np.sign(values.ravel()[kept])
        scale = np.abs(found[name]).max()
        np.testing.assert_allclose(found[name].ravel(), scale * signs, atol=1e-6)
        # Along the task vector itself nothing is lost: <v, v'> = <v, v>.
        assert (values * found[name]).sum() == pytest.approx((values**2).sum(), rel=1e-5)
        across += float((values * found[name]).sum())
        image, whole = image + float((found[name] ** 2).sum()), whole + float((values**2).sum())
    assert report.cosine == pytest.approx(across / (image * whole) ** 0.5, rel=1e-5)
    assert report.bytes == (tmp_path / "delta.compeft").stat().st_size < report.original_bytes / 8


def test_the_same_task_vector_gives_the_same_bytes(tmp_path, delta):
    for name in "ab":
        compress_delta(tmp_path / "delta.safetensors", tmp_path / name, density=0.1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, delta):
    delta["layers.0.q.bias"][3] = np.inf
    save_file(delta, tmp_path / "broken.safetensors")
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q\.bias"):
        compress_delta(tmp_path / "broken.safetensors", tmp_path / "out", density=0.1)
    assert not (tmp_path / "out").exists()
