"""RoutedModel on tiny bases: against loops over tokens, against stock PEFT and its Arrow, and what it refuses."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from moerge import compression
from moerge.errors import AdapterInvalid, ParameterInvalid
from moerge.runtime import RoutedModel, mixing
from moerge.runtime.errors import GatesMissing, NotRoutable
from tests import tiny_peft
from tests.unit.runtime import reference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Unequal ranks, modules and scalings.
KINDS = (
    {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"1.self_attn.q_proj": 9}},
)
ALPHAS = ({}, {}, {"model.layers.1.self_attn.q_proj": 9})
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three experts of the tiny Llama, each with gates."""
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for number, settings in enumerate(KINDS):
            made.append(_expert(tmp_path_factory.mktemp("experts") / f"e{number}", settings, number))
    return made


def _expert(folder, settings, number):
    tiny_peft.saved(folder, LoraConfig(**settings), base=reference.llama, seed=number + 1)
    generator = torch.Generator().manual_seed(number)
    gates = {
        module: torch.randn(part.A.shape[1], generator=generator) for module, part in reference.parts(folder).items()
    }
    save_file(gates, folder / "routing_gates.safetensors", {"method": "phatgoose"})
    return folder


@pytest.fixture(params=["dense", "by expert"])
def way(request, monkeypatch) -> None:
    """Both ways to add what the chosen experts add."""
    monkeypatch.setattr(mixing, "_TURN_COST", -1e18 if request.param == "by expert" else 1e18)


def experts_of(folders):
    return [reference.parts(folder, alpha_of=alpha) for folder, alpha in zip(folders, ALPHAS, strict=True)]


def gates_of(folders):
    return [load_file(folder / "routing_gates.safetensors") for folder in folders]


def directions_of(experts):
    return [{name: torch.from_numpy(reference.leading(part)) for name, part in one.items()} for one in experts]


def ids(count=3, length=7):
    return tiny_peft.tokens(count, length)


def logits(model, given, **more):
    with torch.no_grad():
        return model(given, **more).logits


@pytest.mark.usefixtures("way")
def test_arrow_is_what_a_loop_over_tokens_and_experts_gives(folders):
    experts = experts_of(folders)
    wanted, layers = reference.looped(
        reference.llama(), experts, directions_of(experts), reference.arrow(top_k=2, temperature=0.5)
    )
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="arrow", top_k=2, temperature=0.5)
    torch.testing.assert_close(routed(ids()).logits, logits(wanted, ids()), **CLOSE)
    usage = routed.usage()
    assert usage.keys() == layers.keys()
    for module, layer in layers.items():
        total = sum(layer.used.values())
        assert usage[module] == pytest.approx({f"e{n}": layer.used.get(n, 0) / total for n in range(3)}, abs=1e-5)


@pytest.mark.usefixtures("way")
def test_phatgoose_is_what_a_loop_over_tokens_and_experts_gives(folders):
    wanted, _ = reference.looped(
        reference.llama(), experts_of(folders), gates_of(folders), reference.phatgoose(top_k=2)
    )
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="phatgoose", top_k=2)
    torch.testing.assert_close(routed(ids()).logits, logits(wanted, ids()), **CLOSE)


@pytest.mark.usefixtures("way")
def test_glider_leans_each_input_towards_its_own_experts(folders):
    scores = [[0.9, 0.1, 0.3], [0.0, 0.5, 0.2], [0.2, 0.2, 0.7]]
    wanted, _ = reference.looped(
        reference.llama(), experts_of(folders), gates_of(folders),
        reference.phatgoose(top_k=2, alpha=4.0, scores=scores),
    )  # fmt: skip
    bias = [{f"e{number}": score for number, score in enumerate(row)} for row in scores]
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="glider", top_k=2, alpha=4.0, bias=bias)
    torch.testing.assert_close(routed(ids()).logits, logits(wanted, ids()), **CLOSE)


def test_arrow_is_that_of_peft_where_peft_has_it(tmp_path):
    paths = [tmp_path / f"e{number}" for number in range(4)]
    for number, path in enumerate(paths):
        tiny_peft.saved(path, tiny_peft.lora(r=3), seed=number)
        # PEFT finds the direction by few steps of an iteration, which a leading value far above the others settles.
        tensors = load_file(path / "adapter_model.safetensors")
        for name in tensors:
            if "lora_A" in name:
                tensors[name][1:] *= 0.02
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    peft = create_arrow_model(
        tiny_peft.bert(), [str(path) for path in paths], ArrowConfig(top_k=2, router_temperature=0.7)
    ).eval()
    routed = RoutedModel.from_folders(tiny_peft.bert(), paths, strategy="arrow", top_k=2, temperature=0.7)
    found, wanted = tiny_peft.outputs(routed.model)[0], tiny_peft.outputs(peft)[0]
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - tiny_peft.outputs(tiny_peft.bert())[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (reference.llama, {"target_modules": "all-linear"}),
        (reference.llama, {"target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
        (reference.llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
        (tiny_peft.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (tiny_peft.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        (tiny_peft.bert, {"target_modules": ["query", "output.dense"], "lora_bias": True}),
    ],
    ids=["linear", "rslora and head", "dora", "conv1d", "conv1d dora", "lora_bias"],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.* have invalid shape")  # PEFT's, of its own biases
@pytest.mark.usefixtures("way")
def test_top1_is_the_single_adapter(tmp_path, base, settings):
    tiny_peft.saved(
        tmp_path / "other", tiny_peft.lora(**{**settings, "use_dora": False, "lora_bias": False}), base=base
    )
    alone = tiny_peft.saved(tmp_path / "mine", tiny_peft.lora(**(settings | {"r": 5})), base=base, seed=7)
    routed = RoutedModel.from_folders(base(), [tmp_path / "other", tmp_path / "mine"], strategy="top1", expert="mine")
    found, wanted = tiny_peft.outputs(routed.model), tiny_peft.outputs(alone)
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    assert (wanted[0] - tiny_peft.outputs(base())[0]).abs().max() > 0.01
    assert all(shares["mine"] == 1.0 for shares in routed.usage().values())


def test_top1_sends_every_input_of_a_batch_to_its_own_expert(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="top1", expert=["e2", "e0", "e2"])
    found = routed(ids()).logits
    for row, number in enumerate([2, 0, 2]):
        alone = tiny_peft.loaded(folders[number], base=reference.llama)
        torch.testing.assert_close(found[row : row + 1], logits(alone, ids()[row : row + 1]), **CLOSE)
    # e0 has no o_proj: its inputs get nothing there, and the two of e2, which lacks v_proj and o_proj, neither.
    assert routed.usage()["model.layers.0.self_attn.o_proj"] == {"e0": 0, "e1": 0, "e2": 0}
    assert routed.usage()["model.layers.0.self_attn.q_proj"] == pytest.approx({"e0": 1 / 3, "e1": 0, "e2": 2 / 3})


def test_smear_merges_by_the_mean_token_without_padding(folders):
    given = ids()
    mask = torch.ones_like(given)
    mask[1, 4:] = 0
    experts, gates = experts_of(folders), gates_of(folders)
    module = "model.layers.0.self_attn.q_proj"
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="smear")
    seen = []
    routed.model.get_base_model().get_submodule(module).register_forward_hook(
        lambda _, arguments, output: seen.append((arguments[0], output))
    )
    routed(given, attention_mask=mask)
    ((tokens, output),) = seen
    layer = reference.llama().get_submodule(module)
    for row, count in enumerate([7, 4, 7]):
        mean = tokens[row, :count].mean(dim=0)
        shares = reference.softmax(
            [float(reference.normal(mean) @ reference.normal(one[module])) / 4.0 for one in gates]
        )
        merged = sum(share * one[module].delta for share, one in zip(shares, experts, strict=True))
        torch.testing.assert_close(output[row], layer(tokens[row]) + tokens[row] @ merged.T, **CLOSE)


def test_uniform_is_the_mean_of_the_experts_that_have_the_module(folders):
    experts = experts_of(folders)
    base = reference.llama()
    for module in {name for one in experts for name in one}:
        here = [one[module].delta for one in experts if module in one]
        base.get_submodule(module).weight.data += sum(here) / len(here)
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="uniform")
    torch.testing.assert_close(routed(ids()).logits, logits(base, ids()), **CLOSE)


@pytest.mark.parametrize("strategy", ["arrow", "phatgoose", "smear", "uniform"])
def test_padding_changes_neither_outputs_nor_usage(folders, strategy):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy=strategy)
    short = ids(1, 5)
    alone, told = routed(short).logits, routed.usage()
    assert all(sum(shares.values()) == pytest.approx(1) for shares in told.values())
    routed.reset_usage()
    padded = torch.cat([torch.full((1, 3), 7), short], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    found = routed(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, alone, **CLOSE)
    for module, shares in routed.usage().items():
        assert shares == pytest.approx(told[module], abs=1e-5)


def test_usage_follows_the_tokens(tmp_path):
    """In the first layer a token comes in as itself, so experts whose deltas read one token each get that token."""
    base, module = reference.llama(), "model.layers.0.self_attn.q_proj"
    inputs = base.model.layers[0].input_layernorm(base.model.embed_tokens.weight).detach()
    for token in (11, 23):
        folder = tmp_path / f"reads-{token}"
        tiny_peft.saved(folder, LoraConfig(r=1, target_modules=["0.self_attn.q_proj"]), base=reference.llama)
        tensors = {
            f"{reference.PREFIX}{module}.lora_A.weight": inputs[token][None].clone(),
            f"{reference.PREFIX}{module}.lora_B.weight": torch.ones(16, 1),
        }
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    routed = RoutedModel.from_folders(base, [tmp_path / "reads-11", tmp_path / "reads-23"], top_k=1)
    with routed.watching() as seen:
        routed(torch.tensor([[11, 11, 23, 23, 11]]))
    assert seen[module][0].tolist() == [[[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]]]
    assert routed.usage() == {module: {"reads-11": pytest.approx(0.6), "reads-23": pytest.approx(0.4)}}
    routed.reset_usage()
    assert routed.usage() == {module: {"reads-11": 0, "reads-23": 0}}


def test_seq2seq_counts_padding_of_encoder_and_decoder_apart(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        tiny_peft.saved(folder, LoraConfig(r=2 + seed, target_modules=["q", "k", "wo"]), base=reference.t5, seed=seed)
    routed = RoutedModel.from_folders(reference.t5(), folders, strategy="arrow", top_k=1)
    given, wanted = ids(2, 6), ids(2, 6).flip(1)
    mask, decoder_mask = torch.ones_like(given), torch.ones_like(given)
    mask[0, 2:], decoder_mask[0, 5:] = 0, 0
    with routed.watching() as seen:
        routed(input_ids=given, attention_mask=mask, decoder_input_ids=wanted, decoder_attention_mask=decoder_mask)
    usage = routed.usage()
    for module, weights in seen.items():
        # Keys of cross-attention are made of what the encoder gave.
        reads_encoder = module.startswith("encoder") or module.endswith("EncDecAttention.k")
        counted = (weights[0] * (mask if reads_encoder else decoder_mask)[..., None]).sum(dim=(0, 1))
        assert list(usage[module].values()) == pytest.approx((counted / counted.sum()).tolist(), abs=1e-9), module


@pytest.mark.parametrize("base", [reference.llama, reference.t5])
def test_generate_with_top1_writes_what_the_single_adapter_writes(tmp_path, base):
    targets = ["q_proj", "v_proj"] if base is reference.llama else ["q", "v"]
    for seed, name in enumerate(("a", "b")):
        config = LoraConfig(r=2 + seed, lora_alpha=16, target_modules=targets)
        tiny_peft.saved(tmp_path / name, config, base=base, seed=seed)
    given = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    given |= {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    wanted = [tiny_peft.loaded(tmp_path / name, base=base).generate(**given) for name in ("a", "b")]
    routed = RoutedModel.from_folders(base(), [tmp_path / "a", tmp_path / "b"], strategy="top1", expert=["b", "a"])
    found = routed.generate(**given)
    width = found.shape[1]
    for row, one in enumerate((wanted[1], wanted[0])):
        told = one[row][:width]
        assert found[row][: len(told)].tolist() == told.tolist()
    assert wanted[0].tolist() != wanted[1].tolist()


def test_a_cache_changes_nothing_and_padded_prompts_count_as_they_are(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="arrow")
    prompt = torch.tensor([[0, 0, 9, 8, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with_cache, counted = routed.generate(prompt, **settings), routed._routers["model.layers.0.self_attn.q_proj"].used
    # 8 tokens of prompts and four new ones of each row; the last is not read again.
    assert float(counted.sum()) == pytest.approx(8 + 2 * 4)
    assert routed.generate(prompt, use_cache=False, **settings).tolist() == with_cache.tolist()


def test_smear_keeps_the_prompts_choice_while_it_writes(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="smear")
    with routed.watching() as seen:
        routed.generate(ids(2, 5), attention_mask=torch.ones(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prompt, *steps = seen["model.layers.1.self_attn.q_proj"]
    assert prompt.shape == (2, 5, 3)
    assert len(steps) == 3
    assert all(torch.equal(step, prompt[:, :1]) for step in steps)
    assert not torch.equal(prompt[0, 0], prompt[1, 0])


def test_another_expert_can_be_chosen_in_the_middle_of_a_text(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="top1", expert="e0")
    start = routed(ids(2, 4), use_cache=True)
    routed.choose("e1")
    mask = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    with routed.watching() as seen:
        routed(ids(2, 2), attention_mask=mask, past_key_values=start.past_key_values)
    assert seen["model.layers.0.self_attn.q_proj"][0].tolist() == [[[0, 1, 0]] * 2] * 2
    # Eight tokens at first; of the four that followed one is padding, as the end of the mask tells.
    assert routed._routers["model.layers.0.self_attn.q_proj"].used.tolist() == [8, 3, 0]


def test_a_compressed_expert_acts_as_it_does_decoded(tmp_path, folders):
    whole, small, decoded = tmp_path / "whole", tmp_path / "small", tmp_path / "decoded"
    tiny_peft.saved(whole, LoraConfig(r=64, target_modules=["q_proj"]), base=reference.llama)
    small.mkdir()
    shutil.copy(whole / "adapter_config.json", small)
    compression.compress(whole, small / "adapter.compeft.safetensors", density=0.5)
    compression.decompress(small / "adapter.compeft.safetensors", decoded)
    routed = RoutedModel.from_folders(reference.llama(), [small, folders[0]], strategy="top1", expert="small")
    wanted = logits(tiny_peft.loaded(decoded, base=reference.llama), ids())
    torch.testing.assert_close(routed(ids()).logits, wanted, **CLOSE)
    assert (wanted - logits(tiny_peft.loaded(whole, base=reference.llama), ids())).abs().max() > 1e-3


def test_an_expert_whose_delta_is_zero_in_a_module_is_not_asked_there(tmp_path, folders):
    shutil.copytree(folders[1], tmp_path / "e1")
    tensors = load_file(tmp_path / "e1" / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    tensors[f"{reference.PREFIX}{module}.lora_B.weight"].zero_()
    save_file(tensors, tmp_path / "e1" / "adapter_model.safetensors", {"format": "pt"})
    routed = RoutedModel.from_folders(reference.llama(), [folders[0], tmp_path / "e1"], top_k=2)
    routed(ids())
    assert routed.usage()[module] == {"e0": 1.0, "e1": 0.0}
    assert routed.usage()["model.layers.1.self_attn.q_proj"]["e1"] > 0


def test_a_model_that_moves_to_another_type_goes_on(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="arrow")
    before = routed(ids()).logits
    torch.testing.assert_close(routed.to(torch.float64)(ids()).logits.float(), before, **CLOSE)
    assert routed.to(torch.bfloat16)(ids()).logits.dtype == torch.bfloat16
    alone = RoutedModel.from_folders(reference.llama().to(torch.bfloat16), folders, strategy="top1", expert="e1")
    wanted = PeftModel.from_pretrained(reference.llama().to(torch.bfloat16), str(folders[1])).eval()
    torch.testing.assert_close(alone(ids()).logits, logits(wanted, ids()), rtol=0, atol=0)


def test_a_routed_model_without_adapters_is_its_base(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders)
    with routed.model.disable_adapter():
        torch.testing.assert_close(routed(ids()).logits, logits(reference.llama(), ids()), rtol=0, atol=0)


def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_the_head_of_one_expert_serves_all_inputs_and_must_be_named(tmp_path):
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "pooler.dense"])
    for seed, name in enumerate(("a", "b")):
        tiny_peft.saved(tmp_path / name, config, base=classifier, seed=seed)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ParameterInvalid, match="modules of their own") as caught:
        RoutedModel.from_folders(classifier(), folders)
    assert caught.value.pointer == "head_of"
    routed = RoutedModel.from_folders(classifier(), folders, strategy="top1", expert="b")
    wanted = logits(tiny_peft.loaded(tmp_path / "b", base=classifier), ids())
    torch.testing.assert_close(routed(ids()).logits, wanted, **CLOSE)
    # From a folder the model gets as many labels as the head has; the adapters' own base says nothing of three.
    classifier().bert.save_pretrained(tmp_path / "base")
    labelled = RoutedModel.from_folders(tmp_path / "base", folders, strategy="top1", expert="b")
    torch.testing.assert_close(labelled(ids()).logits, wanted, **CLOSE)
    with_other = RoutedModel.from_folders(classifier(), folders, strategy="top1", bias={"b": 1.0}, head_of="a")
    assert (with_other(ids()).logits - wanted).abs().max() > 1e-3


def test_what_cannot_be_weighed_per_token_is_refused_by_name(tmp_path, folders):
    def refused(config, base, *, pointer, words):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        tiny_peft.saved(tmp_path / "x", config, base=base)
        with pytest.raises(NotRoutable, match=words) as caught:
            RoutedModel.from_folders(base(), [tmp_path / "x"])
        assert caught.value.pointer == pointer

    refused(IA3Config(target_modules=["query"], feedforward_modules=[]), tiny_peft.bert, pointer="x", words="IA3")
    refused(LoraConfig(target_modules=["embedding"]), tiny_peft.Layers, pointer="embedding", words="Embedding")
    refused(LoraConfig(target_modules=["wide"]), tiny_peft.Layers, pointer="wide", words="Conv2d")
    refused(LoraConfig(target_modules=["query"], bias="all"), tiny_peft.bert, pointer="/bias", words="biases")
    with pytest.raises(NotRoutable, match="does not have") as caught:
        RoutedModel.from_folders(tiny_peft.bert(), [folders[0]])
    assert caught.value.pointer == "model.layers.0.mlp.down_proj"


def test_experts_without_gates_are_named_or_left_out_on_request(tmp_path, folders):
    shutil.copytree(folders[0], tmp_path / "bare")
    (tmp_path / "bare" / "routing_gates.safetensors").unlink()
    both = [folders[1], tmp_path / "bare"]
    with pytest.raises(GatesMissing) as caught:
        RoutedModel.from_folders(reference.llama(), both, strategy="phatgoose")
    assert caught.value.pointer == "bare"
    routed = RoutedModel.from_folders(reference.llama(), both, strategy="phatgoose", skip_gateless=True)
    alone = tiny_peft.loaded(folders[1], base=reference.llama)
    torch.testing.assert_close(routed(ids()).logits, logits(alone, ids()), **CLOSE)


def test_scores_are_asked_for_and_checked(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders, strategy="top1")
    with pytest.raises(ParameterInvalid, match="how well each expert fits"):
        routed(ids())
    with pytest.raises(ParameterInvalid, match="own experts") as caught:
        routed.set_scores({"stranger": 1.0})
    assert caught.value.met == "stranger"
    with pytest.raises(ParameterInvalid, match="finite"):
        routed.set_scores({"e0": float("nan")})
    with pytest.raises(ParameterInvalid, match="knows no hub"):
        routed.ask("which one?")
    routed.choose(["e0", "e1"])
    with pytest.raises(ParameterInvalid) as caught:
        routed(ids(3))
    assert caught.value.met == "scores of 2 inputs for 3"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [({"strategy": "nearest"}, "strategy"), ({"top_k": 0}, "top_k"), ({"temperature": 0.0}, "temperature"),
     ({"alpha": float("inf")}, "alpha")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(folders, changes, pointer):
    with pytest.raises(ParameterInvalid) as caught:
        RoutedModel.from_folders(reference.llama(), folders, **changes)
    assert caught.value.pointer == pointer


def test_an_adapter_set_active_beside_the_routing_is_refused(folders):
    routed = RoutedModel.from_folders(reference.llama(), folders)
    routed.model.set_adapter("expert_1")
    with pytest.raises(ParameterInvalid, match="was set active"):
        routed(ids())


def test_a_model_with_adapters_is_refused_and_so_is_a_head_of_another_shape(tmp_path, folders):
    base = reference.llama()
    RoutedModel.from_folders(base, folders)
    with pytest.raises(ParameterInvalid, match="has adapters already"):
        RoutedModel.from_folders(base, folders)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    tiny_peft.saved(tmp_path / "three", config, base=classifier)
    two = BertForSequenceClassification(
        classifier().config.__class__(**{**classifier().config.to_dict(), "num_labels": 2})
    )
    with pytest.raises(NotRoutable, match=r"three replaces classifier\.bias") as caught:
        RoutedModel.from_folders(two, [tmp_path / "three"], head_of="three")
    assert caught.value.pointer == "classifier.bias"


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        RoutedModel.from_folders(tiny_peft.bert(), [tmp_path])


def test_folders_of_one_name_are_told_apart(tmp_path, folders):
    shutil.copytree(folders[0], tmp_path / "ann" / "lora")
    shutil.copytree(folders[1], tmp_path / "bob" / "lora")
    routed = RoutedModel.from_folders(reference.llama(), [tmp_path / "ann" / "lora", tmp_path / "bob" / "lora"])
    assert routed.experts == ("ann/lora", "bob/lora")
