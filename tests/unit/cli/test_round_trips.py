"""What `moerge compress` writes, `moerge decompress` turns back into what stock PEFT or torch load."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moerge.compression import open_any
from tests.unit.cli import models
from tests.unit.cli.models import WORDS, Model

FACTORS = ("lora_A", "lora_B")
KINDS = {
    "lora": (models.lora(), []),
    "rslora": (models.lora(use_rslora=True), []),
    "dora": (models.lora(use_dora=True), []),
    "heads": (models.lora(modules_to_save=["head"]), []),
    "ia3": (models.ia3(), ["--include", "ia3"]),
    "paper": (models.lora(), ["--recipe", "paper", "--alpha", "2"]),
    "stc": (models.lora(), ["--recipe", "paper", "--scale-rule", "stc"]),
    "hq": (models.lora(), ["--recipe", "hq"]),
    "hq-rule": (models.lora(), ["--scale-rule", "hq"]),
    "int4": (models.lora(), ["--preset", "int4"]),
}


def there_and_back(moerge, tmp_path, options):
    """Folder `in` to `out` by the command, and its report."""
    report = moerge("compress", tmp_path / "in", tmp_path / "file", "--json", *options)
    assert report.status == 0, report.err
    assert moerge("verify", tmp_path / "file").status == 0
    back = moerge("decompress", tmp_path / "file", tmp_path / "out")
    assert back.status == 0, back.err
    return report.json


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_for_stock_peft(moerge, tmp_path, kind):
    config, options = KINDS[kind]
    if "int4" not in options:
        options = [*options, "--density", "0.3"]
    before = models.saved(tmp_path / "in", config)
    report = there_and_back(moerge, tmp_path, options)
    after = models.tensors(tmp_path / "out" / "adapter_model.safetensors")
    with open_any(tmp_path / "file") as encoded:
        small = set(encoded.entries)
    expected = {name for name in before if any(factor in name for factor in FACTORS)}
    assert small == (set(before) if kind == "ia3" else expected)
    assert after.keys() == before.keys()
    for name, values in before.items():
        if name in small:
            alike = torch.cosine_similarity(after[name].flatten(), values.flatten(), dim=0)
            # hq turns the basis of the factors, and the published STC scales by a mean of either sign.
            assert "hq" in kind or 0.5 < (abs(alike) if kind == "stc" else alike) < 1
        else:
            # Magnitudes of DoRA and heads: bit for bit.
            assert torch.equal(after[name], values), name
    assert report["size"] == sum(before[name].numel() for name in small)
    config_of = [json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("in", "out")]
    assert config_of[0] == config_of[1]
    loaded = models.loaded(tmp_path / "out").state_dict()
    for name, values in after.items():
        parts = [key for key in loaded if key.replace(".default", "").replace(".modules_to_save", "") in
                 {name, name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")}]  # fmt: skip
        assert parts, name
        assert any(torch.equal(loaded[part], values) for part in parts), name


def test_the_options_of_the_command_reach_the_file(moerge, tmp_path):
    models.saved(tmp_path / "in", models.lora())
    for options, expected in [
        (["--density", "0.05"], {"preset": "default", "scale_rule": "unbiased", "density": "0.05"}),
        (["--scale-rule", "norm"], {"preset": "default", "scale_rule": "norm", "density": "0.2"}),
        (["--base-parameters", "13B"], {"preset": "default", "scale_rule": "unbiased", "density": "0.05"}),
        (["--base-parameters", "1.5b"], {"preset": "default", "scale_rule": "unbiased", "density": "0.1"}),
        (["--recipe", "paper", "--alpha", "3"], {"preset": "paper", "scale_rule": "sigma", "alpha": "3.0"}),
        (["--preset", "hq"], {"preset": "hq", "scale_rule": "hq", "density": "0.2"}),
    ]:
        assert moerge("compress", tmp_path / "in", tmp_path / "file", *options).status == 0
        with open_any(tmp_path / "file") as encoded:
            found = {name: encoded.metadata[name] for name in expected}
        assert found == expected


def test_heads_are_halved_on_request_and_exact_otherwise(moerge, tmp_path):
    before = models.saved(tmp_path / "in", models.lora(modules_to_save=["head"]))
    there_and_back(moerge, tmp_path, ["--heads", "bf16"])
    after = models.tensors(tmp_path / "out" / "adapter_model.safetensors")
    heads = [name for name in before if ".head." in name]
    assert len(heads) == 2
    for name in heads:
        assert torch.equal(after[name], before[name].to(torch.bfloat16))


def tuned(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The base after a fine-tune of everything."""
    return {
        name: values + 0.02 * torch.randn(values.shape, generator=generator)
        for name, values in Model().state_dict().items()
    }


def test_a_full_fine_tune_comes_back_onto_its_base(moerge, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "in").mkdir()
    base = Model().state_dict()
    after = tuned(torch.Generator().manual_seed(2))
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    save_file(after, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    (tmp_path / "in" / "config.json").write_text('{"model_type": "mine"}')
    done = moerge(
        "compress", tmp_path / "in", tmp_path / "file", "--base", tmp_path / "base", "--density", "0.5", "--json"
    )
    assert done.status == 0, done.err
    back = moerge("decompress", tmp_path / "file", tmp_path / "out", "--base", tmp_path / "base" / "model.safetensors")
    assert back.status == 0, back.err
    found = models.tensors(tmp_path / "out" / "model.safetensors")
    model = Model(seed=9)
    model.load_state_dict(found)
    for name, values in after.items():
        if values.dim() > 1 and values.numel() >= 1024:
            change, kept = values - base[name], found[name] - base[name]
            assert (kept != 0).float().mean() == pytest.approx(0.5, abs=0.01)
            assert torch.cosine_similarity(change.flatten(), kept.flatten(), dim=0) > 0.8
        else:
            assert torch.equal(found[name], values), name
    assert model(WORDS).shape == (4, 3)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "mine"}


def test_a_full_fine_tune_is_refused_without_its_base_and_with_another(moerge, tmp_path):
    save_file(Model().state_dict(), tmp_path / "base.safetensors")
    save_file(Model(seed=5).state_dict(), tmp_path / "other.safetensors")
    save_file(tuned(torch.Generator().manual_seed(2)), tmp_path / "tuned.safetensors")
    done = moerge("compress", tmp_path / "tuned.safetensors", tmp_path / "file")
    assert (done.status, (tmp_path / "file").exists()) == (1, False)
    assert "--base" in done.err
    done = moerge(
        "compress", tmp_path / "tuned.safetensors", tmp_path / "file", "--base", tmp_path / "base.safetensors"
    )
    assert done.status == 0
    for base in ([], ["--base", tmp_path / "other.safetensors"]):
        done = moerge("decompress", tmp_path / "file", tmp_path / "out", *base)
        assert done.status == 1
        assert "base-mismatch" in done.err
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
