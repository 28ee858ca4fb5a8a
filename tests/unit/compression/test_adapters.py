"""Adapters as files: in, out, the same again, and nothing left behind when it fails."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge.compression import compress_adapter, decompress, verify
from moerge.compression.codecs import compeft
from moerge.compression.manifest import Budget
from moerge.compression.reader import open_encoded
from moerge.errors import AdapterInvalid, ConfigInvalid, EncodedInvalid, HeaderInvalid, ParameterInvalid
from moerge.tensors import files
from tests.unit.compression import samples
from tests.unit.compression.forge import Forge

HEAD = "base_model.model.classifier.weight"


def config(**changes):
    record = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"], "modules_to_save": ["classifier"],
              "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2"}  # fmt: skip
    return json.dumps(record | changes).encode()


@pytest.fixture
def adapter(tmp_path):
    """A folder with a bfloat16 adapter of two modules and a head, and its tensors."""
    rng = np.random.default_rng(11)
    tensors = {name: samples.bf16(values) for name, values in samples.lora(rng).items()}
    tensors[HEAD] = rng.normal(size=(5, 300)).astype(np.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    files.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_bytes(config())
    return folder, tensors


def compress(folder, out, **options):
    return compress_adapter(config(), folder / "adapter_model.safetensors", out, **options)


def test_the_file_is_what_the_codec_makes_of_the_tensors(adapter, tmp_path):
    folder, tensors = adapter
    compress(folder, tmp_path / "x", density=0.1)
    got = compeft.decode((tmp_path / "x").read_bytes())
    expected = compeft.decode(compeft.encode(tensors, {"density": 0.1}))
    assert got.keys() == expected.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(samples.values_of(got[name]), samples.values_of(expected[name]))


def test_the_same_input_gives_the_same_bytes(adapter, tmp_path):
    folder, _ = adapter
    reports = [compress(folder, tmp_path / name) for name in ("x", "y", "x")]
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert reports[0] == reports[1] == reports[2]
    compress(folder, tmp_path / "z", density=0.1)
    assert (tmp_path / "z").read_bytes() != (tmp_path / "x").read_bytes()


def test_the_report_counts_what_lies_on_disk(adapter, tmp_path):
    folder, _ = adapter
    report = compress(folder, tmp_path / "x", density=0.1)
    weights = folder / "adapter_model.safetensors"
    assert report.bytes == (tmp_path / "x").stat().st_size
    assert report.original_bytes == weights.stat().st_size
    assert report.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert report.source_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert report.size == 2 * (8 * 200 + 160 * 8)
    assert report.kept == 2 * (160 + 128)
    assert report.ternary_original_bytes == 2 * report.size
    assert report.density == 0.1
    assert report.preset == "default"
    assert report.scale_rule == "unbiased"
    assert report.alpha is None
    assert report.warnings == ()
    with open_encoded(tmp_path / "x") as encoded:
        assert report.ternary_bytes == encoded.encoded_bytes
        assert report.planes_sha256 == encoded.metadata["planes_sha256"]
        assert encoded.metadata["source_sha256"] == report.source_sha256
        assert encoded.metadata["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
        assert encoded.metadata["density"] == "0.1"
        assert encoded.metadata["preset"] == "default"
        assert encoded.metadata["scale_rule"] == "unbiased"
        assert "alpha" not in encoded.metadata
        assert encoded.plain == (HEAD,)
    assert report.ratio == pytest.approx(report.original_bytes / report.bytes)
    assert report.ternary_ratio == pytest.approx(2 * report.size / report.ternary_bytes)
    assert 0.3 < report.cosine < 0.8
    assert 0.1 < report.product_cosine < 0.8
    assert len(report.tensors) == 4
    assert len(report.modules) == 2
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["tensors"][0]["name"] == report.tensors[0].name
    assert plain["ratio"] == report.ratio


@pytest.mark.parametrize(("base", "density"), [(None, 0.2), (22_000_000, 0.2), (7 * 10**9, 0.1), (65 * 10**9, 0.05)])
def test_the_size_of_the_base_decides_the_density(adapter, tmp_path, base, density):
    report = compress(adapter[0], tmp_path / "x", base_parameters=base)
    assert report.density == density
    assert report.kept == 2 * (round(1600 * density) + round(1280 * density))
    assert compress(adapter[0], tmp_path / "x", base_parameters=base, density=0.5).density == 0.5


def test_paper_is_named_in_the_file_and_reports_its_loss(adapter, tmp_path):
    report = compress(adapter[0], tmp_path / "x", preset="paper", density=0.2)
    assert report.preset == "paper"
    assert report.alpha == 1.0
    assert report.kept == int(report.size * 0.2) + 1 or report.kept > report.size * 0.2
    assert len(report.warnings) == 1
    assert report.sigma_ratio == pytest.approx(5, rel=0.1)
    with open_encoded(tmp_path / "x") as encoded:
        assert encoded.metadata["preset"] == "paper"
        assert encoded.metadata["alpha"] == "1.0"
        assert encoded.metadata["scale_rule"] == "sigma"


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 1), ({"preset": "paper"}, 4), ({"preset": "paper", "scale_rule": "stc"}, 5), ({"preset": "int4"}, 1)],
)
def test_progress_rises_to_one(adapter, tmp_path, options, passes):
    heard = []
    compress(adapter[0], tmp_path / "x", progress=heard.append, **options)
    # Every reading of every tensor moves it, evenly over the values.
    steps = np.diff(sorted({share for share in heard if 0.1 <= share <= 0.85 + 1e-9}))
    assert steps.size == 4 * passes
    assert steps.max() == pytest.approx(0.75 * 1600 / 5760 / passes)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert 0 < heard[0] < 0.5
    assert max(heard[:-1]) == pytest.approx(0.95)


def test_an_adapter_that_is_not_lora_stays_whole(adapter, tmp_path):
    folder, _ = adapter
    report = compress_adapter(config(peft_type="IA3"), folder / "adapter_model.safetensors", tmp_path / "x")
    assert report.size == report.kept == 0
    assert report.cosine is None
    assert report.ternary_ratio is None
    assert "Nothing in this adapter" in report.warnings[0]
    decompress(tmp_path / "x", tmp_path / "out")
    got = files.open_file(tmp_path / "out" / "adapter_model.safetensors")
    with got, files.open_file(folder / "adapter_model.safetensors") as original:
        assert got.names == original.names
        assert all(got.raw(name) == original.raw(name) for name in got.names)


def test_decompressing_gives_a_folder_with_weights_and_config(adapter, tmp_path):
    folder, tensors = adapter
    compress(folder, folder / "adapter.compeft", density=0.1)
    path = decompress(folder / "adapter.compeft", tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "adapter_model.safetensors"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (path.parent / "adapter_config.json").read_bytes() == config()
    decoded = compeft.decode((folder / "adapter.compeft").read_bytes())
    with files.open_file(path) as got:
        assert got.metadata == {"format": "pt"}
        assert set(got.names) == set(tensors)
        for name in got.names:
            assert got.info(name).dtype == samples.dtype_of(tensors[name])
            np.testing.assert_array_equal(got.float32(name), samples.values_of(decoded[name]))
        # What stays as it is, is bit-equal.
        assert got.raw(HEAD) == tensors[HEAD].tobytes()


def test_a_given_config_wins_over_the_one_beside(adapter, tmp_path):
    folder, _ = adapter
    compress(folder, folder / "adapter.compeft")
    decompress(folder / "adapter.compeft", tmp_path / "out", config=config(r=4))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())["r"] == 4
    (folder / "adapter_config.json").unlink()
    decompress(folder / "adapter.compeft", tmp_path / "bare")
    assert [entry.name for entry in (tmp_path / "bare").iterdir()] == ["adapter_model.safetensors"]


def test_a_damaged_file_leaves_no_folder(adapter, tmp_path):
    folder, _ = adapter
    compress(folder, tmp_path / "x")
    made = Forge.of((tmp_path / "x").read_bytes())
    (tmp_path / "x").write_bytes(made.build(sha256="0" * 64))
    with pytest.raises(EncodedInvalid) as caught:
        decompress(tmp_path / "x", tmp_path / "out")
    assert caught.value.rule == "C7.hash"
    assert not (tmp_path / "out").exists()


def test_decompressing_keeps_to_budget_and_shapes(adapter, tmp_path):
    compress(adapter[0], tmp_path / "x")
    for options, rule in (({"budget": Budget(values=100)}, "C2.values"), ({"expected": {}}, "C2.expected")):
        with pytest.raises(EncodedInvalid) as caught:
            decompress(tmp_path / "x", tmp_path / "out", **options)
        assert caught.value.rule == rule


def test_a_failure_leaves_the_old_file_and_nothing_else(adapter, tmp_path):
    folder, tensors = adapter
    out = tmp_path / "out"
    out.mkdir()
    compress(folder, out / "x")
    before = (out / "x").read_bytes()
    values = samples.values_of(tensors[HEAD.replace("classifier", "q.lora_B")])
    values[3, 3] = np.nan
    tensors[HEAD.replace("classifier", "q.lora_B")] = samples.bf16(values)
    files.write(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(AdapterInvalid):
        compress(folder, out / "x")
    assert [entry.name for entry in out.iterdir()] == ["x"]
    assert (out / "x").read_bytes() == before


def test_bad_input_is_refused_by_its_own_error(adapter, tmp_path):
    folder, _ = adapter
    weights = folder / "adapter_model.safetensors"
    with pytest.raises(ParameterInvalid):
        compress(folder, tmp_path / "x", density=2)
    with pytest.raises(ConfigInvalid):
        compress_adapter(b"{", weights, tmp_path / "x")
    weights.write_bytes(b"\x80\x04pickle, perhaps")
    with pytest.raises(HeaderInvalid):
        compress(folder, tmp_path / "x")
    with pytest.raises(EncodedInvalid):
        decompress(weights, tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_compression_needs_no_torch():
    code = "import moerge.compression, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_decompressed_file_is_read_by_the_safetensors_library(adapter, tmp_path):
    folder, tensors = adapter
    float32 = {name: samples.values_of(values) for name, values in tensors.items()}
    files.write(folder / "adapter_model.safetensors", float32)
    compress(folder, tmp_path / "x", density=0.5)
    decompress(tmp_path / "x", tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: values.shape for name, values in loaded.items()} == {n: v.shape for n, v in float32.items()}


def test_verifying_checks_every_plane_and_tells_what_the_file_says(adapter, tmp_path):
    report = compress(adapter[0], tmp_path / "x", density=0.1)
    facts = verify(tmp_path / "x")
    assert facts["format"] == "compeft"
    assert facts["density"] == "0.1"
    assert facts["file_bytes"] == report.bytes
    assert facts["encoded_bytes"] == report.ternary_bytes
    assert (facts["encoded_tensors"], facts["plain_tensors"]) == (4, 1)
    made = Forge.of((tmp_path / "x").read_bytes())
    made.signs = bytes([made.signs[0] ^ 1]) + made.signs[1:]
    (tmp_path / "x").write_bytes(made.build(sha256=made.metadata["planes_sha256"]))
    with pytest.raises(EncodedInvalid) as caught:
        verify(tmp_path / "x")
    assert caught.value.rule == "C7.hash"


def test_heads_in_double_precision_can_be_rounded_too(adapter, tmp_path):
    folder, tensors = adapter
    head = np.random.default_rng(1).normal(size=(5, 300))
    files.write(folder / "adapter_model.safetensors", tensors | {HEAD: head})
    compress(folder, tmp_path / "x", heads="bf16")
    with open_encoded(tmp_path / "x") as encoded:
        np.testing.assert_array_equal(encoded.tensor(HEAD).bits, files.to_bf16(head.astype(np.float32)))


def test_decompressing_tells_how_far_it_is(adapter, tmp_path):
    compress(adapter[0], tmp_path / "x")
    heard = []
    decompress(tmp_path / "x", tmp_path / "out", progress=heard.append)
    total = 2 * (8 * 200 + 160 * 8) + 5 * 300
    # The head is float32, and wide dtypes come first in a file.
    assert heard == pytest.approx(np.cumsum([1500, 1600, 1280, 1600, 1280]) / total)


def test_bases_can_be_read_by_a_function(tmp_path):
    rng = np.random.default_rng(2)
    base = rng.normal(size=(40, 30)).astype(np.float32)
    tuned = base + np.float32(0.01) * rng.normal(size=(40, 30)).astype(np.float32)
    (tmp_path / "x").write_bytes(compeft.encode({"w": tuned}, {}, initial={"w": lambda: base}))
    decompress(tmp_path / "x", tmp_path / "out", initial=lambda name: {"w": base}[name])
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")["w"]
    np.testing.assert_array_equal(got, compeft.decode((tmp_path / "x").read_bytes(), initial=lambda _: base)["w"])
    assert np.count_nonzero(got != base) == 240
