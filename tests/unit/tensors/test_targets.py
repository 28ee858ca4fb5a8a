"""Target modules, ranks, alphas and saved modules are those that PEFT finds."""

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from moerge.tensors.config import AdapterConfig
from moerge.tensors.targets import Targets

NAMES = [
    "embed_tokens", "layers.0.q_proj", "layers.3.q_proj", "model.layers.0.self_attn.q_proj",
    "model.layers.3.self_attn.k_proj", "model.layers.3.experts.7.q_proj", "model.decoder.h.3.q_proj", "q_proj",
    "xq_proj", "model.classifier.dense.q_proj", "model.preclassifier.q_proj", "score", "model.layers.10.mlp.up_proj",
]  # fmt: skip
CASES = [
    {"target_modules": ("q_proj",)},
    {"target_modules": ("q_proj", "k_proj", "score")},
    {"target_modules": ("self_attn.q_proj", "layers.3.q_proj")},
    {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": ()},
    {"target_modules": ("q_proj",), "exclude_modules": ("layers.0.q_proj", "xq_proj")},
    {"target_modules": ("q_proj", "k_proj"), "exclude_modules": r".*\.3\..*"},
    {"target_modules": ("q_proj",), "modules_to_save": ("classifier", "score")},
    {"target_modules": ("q_proj",), "modules_to_save": ("layers.3",)},
    {"target_modules": ("q_proj",), "modules_to_save": ("(pre)?classifier",)},
    {"target_modules": ("q_proj", "k_proj"), "layers_to_transform": (3,)},
    {"target_modules": ("q_proj", "k_proj"), "layers_to_transform": (0, 10)},
    {"target_modules": ("q_proj",), "layers_to_transform": (7,)},
    {"target_modules": ("q_proj",), "layers_to_transform": ()},
    {"target_modules": ("q_proj",), "layers_to_transform": (3,), "layers_pattern": ("h",)},
    {"target_modules": ("q_proj",), "layers_to_transform": (3,), "layers_pattern": ("layers", "h")},
    {"target_modules": ("q_proj",), "layers_to_transform": (7,), "layers_pattern": ("experts",)},
]  # fmt: skip


@pytest.mark.parametrize("fields", CASES)
def test_a_module_is_a_target_where_it_is_one_for_peft(fields):
    theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    theirs = {"exclude_modules": None, "modules_to_save": None, "target_parameters": None, **theirs}
    targets = Targets(AdapterConfig(peft_type="LORA", **fields))
    for name in NAMES:
        wanted = bool(check_target_module_exists(SimpleNamespace(**theirs), name))
        assert targets.is_target(name) == wanted, name


def test_targets_that_only_the_base_can_tell_are_believed():
    for given in (None, "all-linear", "ALL-linear"):
        assert Targets(AdapterConfig(peft_type="LORA", target_modules=given)).is_target("anything.at.all")


def test_ranks_and_alphas_come_from_the_first_pattern_that_matches():
    config = AdapterConfig(
        peft_type="LORA", r=8, lora_alpha=16, rank_pattern={"q_proj": 2, r"layers\.0\..*": 4},
        alpha_pattern={r"layers\.0\..*": 5.0, "q_proj": 6.0},
    )  # fmt: skip
    targets = Targets(config)
    assert [targets.rank(name) for name in ("layers.0.q_proj", "layers.0.k_proj", "layers.1.k_proj")] == [2, 4, 8]
    assert [targets.alpha(name) for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj")] == [5, 6, 16]


def test_the_projection_inside_a_multihead_attention_has_the_rank_of_its_module():
    config = AdapterConfig(peft_type="LORA", r=8, rank_pattern={"attn": 2}, target_modules=("attn",))
    assert Targets(config).rank("layer.attn.base_layer.out_proj") == 2
    assert Targets(config).is_target("layer.attn.base_layer.out_proj")


def test_a_parameter_is_saved_where_a_part_of_its_path_ends_with_a_saved_module():
    targets = Targets(AdapterConfig(peft_type="LORA", modules_to_save=("classifier", "a.head")))
    wanted = {"classifier.weight": True, "x.classifier.dense.bias": True, "preclassifier.weight": True,
              "x.a.head.weight": True, "head.weight": False, "classifier": False, "x.classifiers.weight": False}  # fmt: skip
    assert {path: targets.is_saved(path) for path in wanted} == wanted
