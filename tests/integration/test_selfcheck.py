"""The check before a merge becomes ready: what is sound passes, and every way of being wrong is seen."""

import json

import numpy as np
import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from moerge.compression import compress_delta
from moerge.merging import recipe as recipes
from moerge.merging import run as merging
from moerge.merging import ternary
from moerge.tensors import adapters
from moerge.tensors.bases import BaseWeights
from moerge.tensors.places import of_base_tensor
from registry.errors import MergeSelfCheckFailed
from tests import tiny, tiny_peft
from workers import selfcheck

# What PEFT asks of models of transformers, and what it says of its own biases as it saves them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.* have invalid shape"),
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = f"base_model.model.{tiny.QUERY}.lora_{{}}.weight"
BASE_SHAPES = {f"encoder.layer.*.attention.self.{name}": [384, 384] for name in ("query", "key", "value")}


def parents(folder, *trees):
    """Adapters in folders of their own, open for merging."""
    found = []
    for number, tree in enumerate(trees):
        place = tiny.write(tree, folder / f"expert-{number}")
        config = adapters.parse_config((place / CONFIG).read_bytes())
        found.append(adapters.load(config, place / WEIGHTS, accept=merging.ACCEPTED))
    return found


def trained(folder, *configs, base):
    """Adapters of a tiny base, trained and saved by PEFT itself."""
    trees = []
    for number, config in enumerate(configs):
        place = folder / f"trained-{number}"
        tiny_peft.saved(place, config, base=base, seed=number)
        trees.append({path.name: path.read_bytes() for path in place.iterdir() if path.name in {CONFIG, WEIGHTS}})
    return parents(folder, *trees)


def merged(folder, experts, *, method="linear", parameters=None, base=None, **output):
    """A merge of experts in `folder / out`, and what the check needs to know of it."""
    body = {
        "base_model": tiny.BASE,
        "method": method,
        "parameters": parameters or {},
        "output": output,
        **({"base_weights": base.digest} if base else {}),
        "experts": [
            {"expert": f"ann/{n}", "revision": "main", "digest": expert.digest, "weight": 0.5 + n}
            for n, expert in enumerate(experts)
        ],
    }
    recipe = recipes.parse(body)
    sample = selfcheck.Sample(recipe.digest)
    by_digest = {expert.digest: expert for expert in experts}
    merging.merge(recipe, by_digest, folder / "out", base=base, observe=sample)
    return {"recipe": recipe, "sample": sample, "adapters": experts, "base": base, "base_shapes": BASE_SHAPES}


@pytest.fixture
def made(tmp_path):
    """A sound merge of two LoRAs on a layer of which the base has more modules."""
    experts = parents(
        tmp_path,
        tiny.lora(seed=1, rank=2, alpha=6, modules=(tiny.QUERY, tiny.VALUE)),
        tiny.lora(seed=2, rank=3, alpha=2, modules=(tiny.VALUE,)),
    )
    return tmp_path / "out", merged(tmp_path, experts)


def test_a_sound_merge_passes_and_tells_what_loaded_it(made) -> None:
    folder, known = made
    found = selfcheck.check(folder, **known)
    assert (found["state"], found["modules"]) == ("passed", 2)
    assert found["largest_relative_error"] < 1e-12
    assert found["peft"].count(".") == 2
    assert found["torch"] == torch.__version__


def change_tensors(folder, change, *, file=WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def change_config(folder, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def scaled(name, factor):
    return lambda tensors: tensors[name].mul_(factor)


def moved(name):
    """One value of a factor, changed by a thousandth of the largest."""
    return lambda tensors: tensors[name][0, 0].add_(1e-3 * tensors[name].abs().max())


WRONG = {
    "a flipped sign in one factor": lambda folder: change_tensors(folder, scaled(KEY.format("B"), -1)),
    "both factors twice as large": lambda folder: change_tensors(folder, scaled(KEY.format("A"), 2)),
    "one value of one factor": lambda folder: change_tensors(folder, moved(KEY.format("A"))),
    "two modules changed for each other": lambda folder: change_tensors(
        folder,
        lambda tensors: tensors.update(
            {KEY.format(f): tensors[KEY.format(f).replace("query", "value")].clone() for f in "AB"}
        ),
    ),
    "another alpha": lambda folder: change_config(folder, lora_alpha=10),
    "another scaling": lambda folder: change_config(folder, use_rslora=True),
    "an alpha for one module": lambda folder: change_config(folder, alpha_pattern={"query": 7}),
    "another rank": lambda folder: change_config(folder, r=4, lora_alpha=4),
    "factors of another rank": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({KEY.format("A"): torch.zeros(9, 384)})
    ),
    "a module without one factor": lambda folder: change_tensors(folder, lambda tensors: tensors.pop(KEY.format("A"))),
    "a module that is named and not there": lambda folder: change_tensors(
        folder, lambda tensors: [tensors.pop(KEY.format(f)) for f in "AB"]
    ),
    "a module that is neither named nor there": lambda folder: (
        change_tensors(folder, lambda tensors: [tensors.pop(KEY.format(f)) for f in "AB"]),
        change_config(folder, target_modules=[tiny.VALUE]),
    ),
    "a tensor that nobody asked for": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({"base_model.model.pooler.weight": torch.zeros(2, 2)})
    ),
    "a bias that the config does not name": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({KEY.format("B").replace("weight", "bias"): torch.ones(384)})
    ),
    "targets that match another module of the base": lambda folder: change_config(
        folder, target_modules=["query", "value", "key"]
    ),
    "targets that match nothing": lambda folder: change_config(folder, target_modules=["nothing"]),
    "layers called turned over": lambda folder: change_config(folder, fan_in_fan_out=True),
    "a kind that PEFT does not know": lambda folder: change_config(folder, peft_type="LOREM"),
    "weights that are not safetensors": lambda folder: (folder / WEIGHTS).write_bytes(b"nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_result_that_is_not_what_was_computed_is_refused(case, made) -> None:
    folder, known = made
    WRONG[case](folder)
    with pytest.raises(MergeSelfCheckFailed) as refused:
        selfcheck.check(folder, **known)
    assert refused.value.faults[0].pointer
    assert refused.value.faults[0].remedy


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_result_of_half_precision_passes_and_one_bit_of_it_counts(dtype, tmp_path) -> None:
    experts = parents(tmp_path, tiny.lora(seed=1), tiny.lora(seed=2, rank=7))
    known = merged(tmp_path, experts, method="ties", rank=3, dtype=dtype)
    assert selfcheck.check(tmp_path / "out", **known)["largest_relative_error"] < 1e-12
    change_tensors(
        tmp_path / "out", lambda tensors: tensors[KEY.format("B")].mul_(torch.tensor(1.008).to(getattr(torch, dtype)))
    )
    with pytest.raises(MergeSelfCheckFailed):
        selfcheck.check(tmp_path / "out", **known)


def test_every_form_of_layer_loads_where_it_belongs(tmp_path) -> None:
    config = tiny_peft.lora(target_modules=["embedding", "narrow", "wide", "line"])
    known = merged(tmp_path, trained(tmp_path, config, config, base=tiny_peft.Layers))
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 4
    change_tensors(tmp_path / "out", scaled("base_model.model.wide.lora_B.weight", -1))
    with pytest.raises(MergeSelfCheckFailed, match="wide"):
        selfcheck.check(tmp_path / "out", **known)


class Turned(torch.nn.Module):
    """Layers that store their weight as (in, out); one of them is square, so that its shape does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(9, 6)
        self.square = Conv1D(6, 6)


def test_layers_that_store_their_weight_turned_over_load_so(tmp_path) -> None:
    config = tiny_peft.lora(target_modules=["wide", "square"], fan_in_fan_out=True)
    known = merged(tmp_path, trained(tmp_path, config, config, base=Turned))
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 2
    change_config(tmp_path / "out", fan_in_fan_out=False)
    with pytest.raises(MergeSelfCheckFailed, match="warns"):
        selfcheck.check(tmp_path / "out", **known)


def test_eight_modules_are_sampled_whatever_the_order(tmp_path) -> None:
    names = [f"encoder.layer.{n}.attention.self.query" for n in range(12)]
    known = merged(tmp_path, parents(tmp_path, tiny.lora(seed=1, modules=names, size=8)))
    sample = known["sample"]
    assert len(sample.taken) == 8
    assert len(sample.shapes) == 12
    again = selfcheck.Sample(sample.digest)
    for place in reversed(sample.shapes):
        again(place, np.zeros((8, 8), np.float32))
    assert set(again.taken) == set(sample.taken)
    other = selfcheck.Sample("another recipe")
    for place in sample.shapes:
        other(place, np.zeros((8, 8), np.float32))
    assert set(other.taken) != set(sample.taken)
    assert selfcheck.check(tmp_path / "out", **(known | {"base_shapes": {}}))["modules"] == 8


def test_a_wrong_outcome_of_nothing_is_seen(tmp_path) -> None:
    """Where the merged delta is zero, anything that is loaded in its place is wrong."""
    experts = parents(tmp_path, tiny.lora(seed=1))
    known = merged(tmp_path, experts, method="task_arithmetic", parameters={"scale": 0.0})
    assert selfcheck.check(tmp_path / "out", **known)["largest_relative_error"] == 0
    change_tensors(
        tmp_path / "out", lambda tensors: tensors.update({KEY.format(f): torch.ones_like(tensors[KEY.format(f)]) for f in "AB"})
    )  # fmt: skip
    with pytest.raises(MergeSelfCheckFailed):
        selfcheck.check(tmp_path / "out", **known)


def refused(folder, known, *, pointer: str) -> None:
    with pytest.raises(MergeSelfCheckFailed) as met:
        selfcheck.check(folder, **known)
    assert met.value.faults[0].pointer == pointer


def test_gains_load_as_they_were_computed(tmp_path) -> None:
    config = IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])
    known = merged(tmp_path, trained(tmp_path, config, config, base=tiny_peft.bert), kind="ia3")
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 6
    place = next(place for place in known["sample"].taken if place.name.endswith("query"))
    # What is written is one more than what was merged, and the sign is of that.
    name = f"base_model.model.{place.name}.ia3_l"
    change_tensors(tmp_path / "out", lambda tensors: tensors.update({name: 2 - tensors[name]}))
    refused(tmp_path / "out", known, pointer=place.name)


def test_biases_of_the_adapter_load_as_they_were_computed(tmp_path) -> None:
    config = tiny_peft.lora(lora_bias=True)
    known = merged(tmp_path, trained(tmp_path, config, config, base=tiny_peft.bert))
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 4
    name = "encoder.layer.1.attention.self.value"
    change_tensors(tmp_path / "out", scaled(f"base_model.model.{name}.lora_B.bias", -1))
    refused(tmp_path / "out", known, pointer=f"{name} (bias)")


def test_modules_that_an_adapter_brings_whole_must_be_there(tmp_path) -> None:
    plain, whole = tiny_peft.lora(), tiny_peft.lora(modules_to_save=["pooler"])
    known = merged(tmp_path, trained(tmp_path, plain, whole, base=tiny_peft.bert))
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 4
    name = "base_model.model.pooler.dense.bias"
    change_tensors(tmp_path / "out", lambda tensors: tensors.pop(name))
    with pytest.raises(MergeSelfCheckFailed):
        selfcheck.check(tmp_path / "out", **known)


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["pooler"]}])
def test_trained_biases_load_under_the_names_that_peft_gives_them(more, tmp_path) -> None:
    base = checkpoint(tmp_path / "base", tiny_peft.bert())
    experts = trained(tmp_path, *[tiny_peft.lora(bias="all", **more)] * 2, base=tiny_peft.bert)
    known = merged(tmp_path, experts, base=base)
    assert selfcheck.check(tmp_path / "out", **known)["modules"] == 4
    place = next(place for place in known["sample"].taken if place.role == "saved")
    stored = next(name for name in load_file(tmp_path / "out" / WEIGHTS) if of_base_tensor(name) == place.name)
    change_tensors(tmp_path / "out", scaled(stored, -1))
    refused(tmp_path / "out", known, pointer=place.key)


def checkpoint(folder, model) -> BaseWeights:
    folder.mkdir()
    tensors = {name: values.contiguous() for name, values in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return BaseWeights(folder)


@pytest.mark.parametrize("kind", ["delta", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_result_is_reopened_and_compared(kind, dtype, tmp_path) -> None:
    config = tiny_peft.lora(target_modules=["embedding", "narrow", "wide", "line"])
    experts = trained(tmp_path, config, config, base=tiny_peft.Layers)
    base = checkpoint(tmp_path / "base", tiny_peft.Layers())
    known = merged(tmp_path, experts, base=base if kind == "full" else None, kind=kind, dtype=dtype)
    out, file = tmp_path / "out", "model.safetensors" if kind == "full" else "delta.safetensors"
    found = selfcheck.check(out, **known)
    assert (found["state"], found["modules"]) == ("passed", 4)
    assert found["largest_relative_error"] < 1e-6
    right = (out / file).read_bytes()
    for name in ("embedding.weight", "narrow.weight", "wide.weight", "line.weight"):
        change_tensors(out, scaled(name, -1), file=file)
        refused(out, known, pointer=name)
        (out / file).write_bytes(right)
    change_tensors(out, lambda tensors: tensors.pop("line.weight"), file=file)
    refused(out, known, pointer="line.weight")
    (out / file).write_bytes(right)
    change_tensors(out, lambda tensors: tensors.update(more=torch.zeros(1)), file=file)
    refused(out, known, pointer="more")
    (out / file).write_bytes(right)
    change_tensors(out, lambda tensors: tensors.update({"line.weight": tensors["line.weight"].double()}), file=file)
    refused(out, known, pointer="line.weight")


def encode(recipe, out):
    """The dense delta of a folder made ternary, as the worker does it."""
    ternary.encode({"warnings": []}, out, recipe, compress=compress_delta, progress=lambda _share: None)


def test_a_ternary_result_has_the_signs_that_were_computed(tmp_path) -> None:
    experts = parents(tmp_path, tiny.lora(seed=1, modules=(tiny.QUERY, tiny.VALUE)), tiny.lora(seed=2))
    known = merged(tmp_path, experts, kind="ternary", density=0.2)
    out = tmp_path / "out"
    dense = load_file(out / "delta.safetensors")
    encode(known["recipe"], out)
    assert selfcheck.check(out, **known)["modules"] == 2
    name = f"{tiny.QUERY}.weight"
    save_file(dense | {name: -dense[name]}, out / "delta.safetensors", metadata={"format": "pt"})
    encode(known["recipe"], out)
    refused(out, known, pointer=name)
    dense.pop(name)
    save_file(dense, out / "delta.safetensors", metadata={"format": "pt"})
    encode(known["recipe"], out)
    refused(out, known, pointer=name)
