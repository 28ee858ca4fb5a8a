"""What every kind and setting of PEFT does survives loading and saving, or is refused by name.

An adapter is made and saved by stock PEFT, loaded and saved again by us, and loaded by stock PEFT, which must then
compute what it computed with the first. The walk at the end holds both lists against PEFT's own.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PeftType,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from moerge.errors import AdapterInvalid, HeaderInvalid
from moerge.tensors import adapters, files, header, products, saving
from moerge.tensors.bases import BaseWeights
from moerge.tensors.kind import Dense
from moerge.tensors.kinds import lora
from tests import tiny_peft as tiny

# PEFT warns about what these settings are good for; where an adapter of ours is loaded, warnings are errors again.
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass(frozen=True)
class Kept:
    """An adapter that comes back as it was. `blocker` is what refuses it without the weights of its base."""

    kind: str
    make: Callable[[], Any]
    field: str = ""
    base: Callable[[], torch.nn.Module] = tiny.bert
    blocker: str = ""
    with_base: bool = False


def lora_case(field: str, /, *, base=tiny.bert, blocker: str = "", **changes: Any) -> Kept:
    return Kept("LORA", functools.partial(tiny.lora, **changes), field, base, blocker)


def case(
    kind: str, make: Callable[..., Any], /, *, base=tiny.bert, blocker: str = "", with_base=False, **settings: Any
) -> Kept:
    return Kept(kind, functools.partial(make, **settings), "", base, blocker, with_base)


CONV1D = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
LINEAR = ["query", "output.dense", "intermediate.dense"]
KEEPS = {
    "LoRA": lora_case("r", r=5),
    "alpha": lora_case("lora_alpha", lora_alpha=2),
    "rsLoRA": lora_case("use_rslora", use_rslora=True),
    "ranks": lora_case("rank_pattern", rank_pattern={"query": 2, r"layer\.1\.attention.*value": 5}),
    "alphas": lora_case("alpha_pattern", alpha_pattern={"value": 3}),
    "targets by a pattern": lora_case("target_modules", target_modules=r".*(key|output\.dense)"),
    "all linear layers": lora_case("target_modules", target_modules="all-linear"),
    "without a module": lora_case("exclude_modules", exclude_modules=["layer.1.attention.self.query"]),
    "one layer": lora_case("layers_to_transform", layers_to_transform=[1]),
    "one layer by its list": lora_case("layers_pattern", layers_to_transform=[1], layers_pattern=["layer"]),
    "Conv1D": lora_case("fan_in_fan_out", base=tiny.gpt2, **CONV1D),
    "an embedding": lora_case("target_modules", target_modules=["word_embeddings", "query"]),
    "every form of layer": lora_case("target_modules", target_modules=["embedding", "narrow", "wide", "line"], base=tiny.Layers),
    "MiCA": lora_case("init_lora_weights", init_lora_weights="mica"),
    "biases on B": lora_case("lora_bias", lora_bias=True),
    "biases on B of Conv1D": lora_case("lora_bias", lora_bias=True, base=tiny.gpt2, **CONV1D),
    "biases on B of convolutions": lora_case("lora_bias", lora_bias=True, target_modules=["narrow", "wide", "line"], base=tiny.Layers),
    "DoRA": lora_case("use_dora", blocker="/use_dora", use_dora=True, target_modules=LINEAR),
    "DoRA and rsLoRA": lora_case("use_dora", blocker="/use_dora", use_dora=True, use_rslora=True, rank_pattern={"query": 2}),
    "DoRA of Conv1D": lora_case("use_dora", blocker="/use_dora", use_dora=True, base=tiny.gpt2, **CONV1D),
    "DoRA of every form of layer": lora_case("use_dora", blocker="/use_dora", use_dora=True,
                                             target_modules=["embedding", "narrow", "wide", "line"], base=tiny.Layers),
    "a saved module": lora_case("modules_to_save", blocker="/modules_to_save", modules_to_save=["pooler"]),
    "saved norms": lora_case("modules_to_save", blocker="/modules_to_save", modules_to_save=["LayerNorm", "pooler.dense"]),
    "a saved embedding": lora_case("modules_to_save", blocker="/modules_to_save", modules_to_save=["word_embeddings"]),
    "all biases": lora_case("bias", blocker="/bias", bias="all"),
    "biases of targets": lora_case("bias", blocker="/bias", bias="lora_only"),
    "all biases and a saved module": lora_case("bias", blocker="/bias", bias="all", modules_to_save=["pooler"]),
    "AdaLoRA": case("ADALORA", AdaLoraConfig, init_r=5, lora_alpha=7, total_step=10, target_modules=LINEAR),
    "AdaLoRA of Conv1D": case("ADALORA", AdaLoraConfig, init_r=2, lora_alpha=7, total_step=10, base=tiny.gpt2, **CONV1D),
    "AdaLoRA without alpha": case("ADALORA", AdaLoraConfig, init_r=3, lora_alpha=0, total_step=10, target_modules=LINEAR),
    "AdaLoRA of a convolution": case("ADALORA", AdaLoraConfig, init_r=3, lora_alpha=7, total_step=10, base=tiny.Layers,
                                     target_modules=["wide"], with_base=True),
    "LoHa": case("LOHA", LoHaConfig, r=3, alpha=7, target_modules=LINEAR, rank_pattern={"query": 2}, alpha_pattern={"query": 3}),
    "LoHa of a high rank": case("LOHA", LoHaConfig, r=6, alpha=7, target_modules=LINEAR),
    "LoHa of a core": case("LOHA", LoHaConfig, r=2, alpha=7, target_modules=["wide"], use_effective_conv2d=True, base=tiny.Layers),
    "LoHa of a core over one dimension": case("LOHA", LoHaConfig, r=2, alpha=7, target_modules=["narrow", "line"],
                                              use_effective_conv2d=True, base=tiny.Layers, blocker="hada_t1"),
    "LoHa of flat convolutions": case("LOHA", LoHaConfig, r=2, alpha=7, target_modules=["narrow", "wide"], base=tiny.Layers, with_base=True),
    "LoHa and a saved module": case("LOHA", LoHaConfig, r=3, alpha=7, target_modules=["query"], modules_to_save=["pooler"],
                                    blocker="/modules_to_save"),
    "LoKr": case("LOKR", LoKrConfig, r=2, alpha=7, target_modules=LINEAR, rank_pattern={"query": 1}),
    "LoKr of whole factors": case("LOKR", LoKrConfig, r=8, alpha=7, target_modules=LINEAR),
    "LoKr of four factors": case("LOKR", LoKrConfig, r=1, alpha=7, target_modules=LINEAR, decompose_both=True, decompose_factor=4),
    "LoKr with another start": case("LOKR", LoKrConfig, r=2, alpha=7, target_modules=LINEAR, init_weights="lycoris"),
    "LoKr of a whole kernel": case("LOKR", LoKrConfig, r=2, alpha=7, target_modules=["wide"], base=tiny.Layers),
    "LoKr of a core": case("LOKR", LoKrConfig, r=1, alpha=7, target_modules=["wide"], use_effective_conv2d=True, base=tiny.Layers),
    "LoKr of flat convolutions": case("LOKR", LoKrConfig, r=1, alpha=7, target_modules=["narrow", "wide"], base=tiny.Layers, with_base=True),
    "VeRA": case("VERA", VeraConfig, r=8, target_modules=["query", "value"]),
    "VeRA of a high rank": case("VERA", VeraConfig, r=40, target_modules=["query", "value"]),
    "VeRA of unlike modules": case("VERA", VeraConfig, r=8, target_modules=LINEAR, blocker="vera_lambda_b"),
    "VeRA of Conv1D": case("VERA", VeraConfig, r=8, base=tiny.gpt2, blocker="vera_lambda_b", **CONV1D),
    "VeRA and biases": case("VERA", VeraConfig, r=8, target_modules=["query"], bias="vera_only", blocker="/bias"),
    "IA3": case("IA3", IA3Config, target_modules=LINEAR, feedforward_modules=["output.dense"]),
    "IA3 by a pattern": case("IA3", IA3Config, target_modules=r".*\.(key|output\.dense)", feedforward_modules=r".*\d\.output\.dense"),
    "IA3 of Conv1D": case("IA3", IA3Config, base=tiny.gpt2, feedforward_modules=["mlp.c_proj"], **CONV1D),
    "IA3 as a delta": case("IA3", IA3Config, target_modules=LINEAR, feedforward_modules=["output.dense"], with_base=True),
    "IA3 of Conv1D as a delta": case("IA3", IA3Config, base=tiny.gpt2, feedforward_modules=["mlp.c_proj"], with_base=True, **CONV1D),
    "IA3 and a saved module": case("IA3", IA3Config, target_modules=LINEAR, feedforward_modules=[], modules_to_save=["pooler"],
                                   blocker="/modules_to_save"),
}  # fmt: skip


def read(folder):
    config = adapters.parse_config((folder / saving.CONFIG).read_bytes())
    path = folder / saving.WEIGHTS
    head = header.read(path)
    files.check_agreement(path, head)
    return config, head, path


def save_again(adapter, folder):
    """One expert with weight one."""
    fan_in_fan_out = adapter.config.fan_in_fan_out
    if adapter.gains and not adapter.modules:
        return adapters.save_ia3(
            folder, {name: gain.values for name, gain in adapter.gains.items()},
            feedforward=[name for name, gain in adapter.gains.items() if gain.is_feedforward], base_model=None,
            fan_in_fan_out=fan_in_fan_out, saved=adapter.saved,
        )  # fmt: skip
    pairs = {
        name: products.split(found.values) if isinstance(found, Dense) else (found.scaling * found.B, found.A)
        for name, found in adapter.modules.items()
    }
    return adapters.save_lora(
        folder, pairs, base_model=None, layouts=adapter.facts.layouts, fan_in_fan_out=fan_in_fan_out,
        biases=adapter.biases, saved=adapter.saved,
    )  # fmt: skip


def strictly_loaded(folder, base):
    with warnings.catch_warnings():
        # Missing or unexpected keys, and patterns without a match, are warnings of these two kinds.
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return PeftModel.from_pretrained(base(), str(folder)).eval()


@functools.cache
def untouched(base):
    return tiny.outputs(base().eval())


def assert_same(tmp_path, wanted, *, base=tiny.bert, blocker="", with_base=False):
    """That the adapter in `peft` comes back; `blocker` (its pointer, or the end of it) refuses it without its base.

    `wanted` is what the base with the adapter puts out.
    """
    config, head, path = read(tmp_path / "peft")
    facts = adapters.check(config, head)
    assert [item.pointer.endswith(blocker) for item in facts.blockers[:1]] == [True] * bool(blocker)
    with ExitStack() as stack:
        weights = None
        if blocker:
            with pytest.raises(AdapterInvalid) as caught:
                adapters.load(config, path)
            assert caught.value.pointer.endswith(blocker)
        if blocker or with_base:
            weights = stack.enter_context(BaseWeights(tiny.checkpoint(tmp_path / "base", base=base)))
        adapter = adapters.load(config, path, base=weights)
        assert {name: found.shape for name, found in adapter.modules.items()} == adapter.facts.shapes
        ranks = {name: min(found.shape) if isinstance(found, Dense) else found.rank
                 for name, found in adapter.modules.items()}  # fmt: skip
        assert ranks == adapter.facts.ranks
        assert all(rank <= min(adapter.facts.shapes[name]) for name, rank in ranks.items())
        save_again(adapter, tmp_path / "ours")
    found = tiny.outputs(strictly_loaded(tmp_path / "ours", base))
    effect = max(float((one - other).abs().max()) for one, other in zip(wanted, untouched(base), strict=True))
    assert effect > 0.1
    assert max(float((one - other).abs().max()) for one, other in zip(wanted, found, strict=True)) < 1e-5 * effect


@pytest.mark.parametrize("name", KEEPS)
def test_an_adapter_does_in_stock_peft_what_it_did_before_we_saved_it(name, tmp_path):
    kept = KEEPS[name]
    model = tiny.saved(tmp_path / "peft", kept.make(), base=kept.base)
    assert_same(tmp_path, tiny.outputs(model), base=kept.base, blocker=kept.blocker, with_base=kept.with_base)


def test_copies_of_the_biases_of_saved_modules_are_left_out(tmp_path):
    tiny.saved(tmp_path, tiny.lora(bias="all", modules_to_save=["pooler"]))
    config, head, path = read(tmp_path)
    assert sum("original_module" in name for name in head.tensors) == 1
    adapter = adapters.load(config, path, accept=["/bias", "/modules_to_save"])
    names = {name for name, _ in tiny.bert().named_parameters()}
    assert adapter.saved.keys() == {name for name in names if name.endswith(".bias")} | {"pooler.dense.weight"}


def test_an_adalora_comes_back_with_the_ranks_that_training_gave_it(tmp_path):
    tiny.allocated(tmp_path / "peft")
    config, head, _ = read(tmp_path / "peft")
    ranks = set(adapters.check(config, head).ranks.values())
    assert len(ranks) > 1
    assert ranks == {sum(mask) for mask in config.raw["rank_pattern"].values()}
    assert_same(tmp_path, tiny.outputs(tiny.loaded(tmp_path / "peft")))


# What PEFT makes of these is kept as it is, and refused by the name of the setting when it is to be merged.
REFUSED_FIELDS = {
    "trainable_token_indices": {"trainable_token_indices": [1, 3]},
    "target_parameters": {"lora_dropout": 0.0, "target_parameters": ["key.weight"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "use_qalora": {"use_qalora": True},
    "kasa_config": {"kasa_config": KasaConfig()},
    "use_bdlora": {
        "r": 4,
        "lora_dropout": 0.0,
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["query"], target_modules_bd_b=["value"], nblocks=2),
    },
}
# These need other adapters or other layers than there are here, so their settings are written into a config.
WRITTEN_FIELDS = {"arrow_config": {}, "megatron_config": {"tensor_model_parallel_size": 1}}
# Values that training or bookkeeping reads. Set here, they must not change what PEFT computes with what we save.
INERT_FIELDS = {
    "task_type": "FEATURE_EXTRACTION",
    "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"},
    "peft_version": "0.9.0",
    "revision": "main",
    "inference_mode": False,
    "lora_dropout": 0.5,
    "loftq_config": {},
    "eva_config": {},
    "corda_config": {},
    "lora_ga_config": {},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_core": "megatron.core",
    "qalora_group_size": 4,
    "ensure_weight_tying": True,
    "velora_config": {},
    "monteclora_config": {},
    "base_model_name_or_path": "somebody/something",
}
REFUSED_KINDS = {
    "OFT": functools.partial(OFTConfig, oft_block_size=4, target_modules=["query"]),
    "BOFT": functools.partial(BOFTConfig, boft_block_size=4, target_modules=["query"]),
    "HRA": functools.partial(HRAConfig, r=2, target_modules=["query"]),
    "VBLORA": functools.partial(VBLoRAConfig, r=4, num_vectors=8, vector_length=4, topk=2, target_modules=["query"]),
    "RANDLORA": functools.partial(RandLoraConfig, r=4, target_modules=["query"]),
    "FOURIERFT": functools.partial(FourierFTConfig, n_frequency=6, target_modules=["query"]),
    "C3A": functools.partial(C3AConfig, block_size=4, target_modules=["query"]),
    "MISS": functools.partial(MissConfig, r=4, target_modules=["query"]),
    "ROAD": functools.partial(RoadConfig, group_size=4, target_modules=["query"]),
    "LN_TUNING": functools.partial(LNTuningConfig, target_modules=["LayerNorm"]),
    "TRAINABLE_TOKENS": functools.partial(TrainableTokensConfig, token_indices=[1], target_modules=["word_embeddings"]),
    "PROMPT_TUNING": functools.partial(PromptTuningConfig, task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
}
# The first part of a tensor's name of kinds that need more of a model than there is here.
WRITTEN_KINDS = {
    "PREFIX_TUNING": "prompt_embeddings", "P_TUNING": "prompt_embeddings", "CPT": "prompt_embeddings",
    "MULTITASK_PROMPT_TUNING": "prompt_embeddings", "CARTRIDGE": "prompt_embeddings",
    "ADAPTION_PROMPT": "adaption_prompt", "POLY": "poly_lora_A", "XLORA": "xlora_classifier",
}  # fmt: skip


def refused(config, path, **options) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        adapters.load(config, path, **options)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_setting_that_is_not_merged_is_accepted_as_it_is_and_refused_by_name(field, tmp_path):
    tiny.saved(tmp_path / "peft", tiny.lora(**REFUSED_FIELDS[field]))
    config, head, path = read(tmp_path / "peft")
    facts = adapters.check(config, head)
    assert [blocker.pointer for blocker in facts.blockers] == [f"/{field}"]
    assert facts.n_parameters == sum(info.size for info in head.tensors.values())
    assert refused(config, path).pointer == f"/{field}"
    # No base can help here.
    with BaseWeights(tiny.checkpoint(tmp_path / "base")) as base:
        assert refused(config, path, base=base).pointer == f"/{field}"


def rewritten(folder, field, value):
    place = folder / saving.CONFIG
    place.write_text(json.dumps(json.loads(place.read_text()) | {field: value}))


@pytest.mark.parametrize("field", WRITTEN_FIELDS)
def test_a_setting_for_other_layers_is_refused_by_name(field, tmp_path):
    tiny.saved(tmp_path, tiny.lora())
    rewritten(tmp_path, field, WRITTEN_FIELDS[field])
    config, _, path = read(tmp_path)
    assert refused(config, path).pointer == f"/{field}"


@pytest.mark.parametrize(
    "fields", [INERT_FIELDS.keys() - {"velora_config"}, INERT_FIELDS.keys() - {"monteclora_config"}]
)
def test_settings_that_only_training_reads_change_nothing(fields, tmp_path):
    tiny.saved(tmp_path / "peft", tiny.lora(r=4))
    for field in fields:
        rewritten(tmp_path / "peft", field, INERT_FIELDS[field])
    assert_same(tmp_path, tiny.outputs(tiny.loaded(tmp_path / "peft")))


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_a_kind_that_is_not_merged_is_accepted_as_it_is_and_refused_by_name(kind, tmp_path):
    tiny.saved(tmp_path, REFUSED_KINDS[kind]())
    config, head, path = read(tmp_path)
    facts = adapters.check(config, head)
    assert config.peft_type == kind
    assert facts.kind == kind.lower()
    assert facts.n_parameters > 0
    error = refused(config, path, accept=["/peft_type"])
    assert (error.pointer, error.met) == ("/peft_type", kind)
    foreign = dataclasses.replace(head, tensors={"base_model.model.x.y": next(iter(head.tensors.values()))})
    with pytest.raises(AdapterInvalid, match="no place"):
        adapters.check(config, foreign)


@pytest.mark.parametrize(
    "kind",
    sorted(
        {kind.value for kind in PeftType} - {kept.kind for kept in KEEPS.values()} - {"SHIRA"} - REFUSED_KINDS.keys()
    ),
)
def test_a_kind_that_needs_more_of_a_model_is_refused_by_name(kind, tmp_path):
    name = WRITTEN_KINDS.get(kind, f"base_model.model.query.{kind.lower()}_weight")
    files.write(tmp_path / saving.WEIGHTS, {name: torch.ones(2, 2).numpy()})
    config = adapters.parse_config(json.dumps({"peft_type": kind, "target_modules": ["query"]}).encode())
    error = refused(config, tmp_path / saving.WEIGHTS)
    assert (error.pointer, error.met) == ("/peft_type", kind)


def test_shira_is_refused_for_the_integers_it_stores(tmp_path):
    tiny.saved(tmp_path, ShiraConfig(r=2, target_modules=["query"]))
    with pytest.raises(HeaderInvalid) as caught:
        header.read(tmp_path / saving.WEIGHTS)
    assert caught.value.met == "I32"
    assert caught.value.pointer.endswith("query.shira_indices")


def test_every_kind_that_peft_knows_comes_back_or_is_refused():
    """A kind that is new in PEFT is not in the catalogue; one that is merged and comes back nowhere has no case."""
    found = adapters.catalogue()
    assert found.keys() == {kind.value for kind in PeftType}
    assert {kind for kind, known in found.items() if known.delta is not None} == {kept.kind for kept in KEEPS.values()}


def test_every_setting_of_lora_that_peft_knows_comes_back_or_is_refused_or_does_nothing():
    """A setting that is new in PEFT is in none of the lists."""
    kept = {kept.field for kept in KEEPS.values() if kept.kind == "LORA"} | {"peft_type"}
    refusals = REFUSED_FIELDS.keys() | WRITTEN_FIELDS.keys()
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == kept | refusals | INERT_FIELDS.keys()
    # One setting has values of both sorts.
    assert kept & refusals == {"init_lora_weights"}
    assert not (kept | refusals) & INERT_FIELDS.keys()
    assert lora.FIELDS.keys() == fields
    assert {name for name, what in lora.FIELDS.items() if what in ("formed", "with base")} == kept | {
        "base_model_name_or_path"
    }
    assert {name for name, what in lora.FIELDS.items() if what == "with base"} == {
        kept.blocker[1:] for kept in KEEPS.values() if kept.kind == "LORA" and kept.blocker
    }
