"""What is written beside the factors: biases, tensors of the base that are replaced, and the gains of IA3."""

import json

import numpy as np
import pytest
import torch

from moerge.errors import AdapterInvalid
from moerge.tensors import adapters, files, saving
from moerge.tensors.kind import Layout
from tests import tiny_peft as tiny

Q, V = "layer.0.query", "layer.0.value"
P = "base_model.model."


def ones(*shape):
    return np.ones(shape, np.float32)


def pair(out=4, inner=6):
    return ones(out, 2), ones(2, inner)


def read_back(folder, *accept):
    config = adapters.parse_config((folder / saving.CONFIG).read_bytes())
    return adapters.load(config, folder / saving.WEIGHTS, accept=accept)


def test_modules_without_a_bias_get_one_of_zeros_where_another_has_one(tmp_path):
    saving.save_lora(tmp_path, {Q: pair(), V: pair(3)}, base_model=None, biases={V: np.array([1, 2, 3], np.float32)})
    adapter = read_back(tmp_path)
    assert {name: values.tolist() for name, values in adapter.biases.items()} == {Q: [0] * 4, V: [1, 2, 3]}
    assert adapter.config.raw["lora_bias"] is True


def test_without_biases_there_is_no_trace_of_them(tmp_path):
    saving.save_lora(tmp_path, {Q: pair()}, base_model=None, biases={}, saved={})
    adapter = read_back(tmp_path)
    assert (dict(adapter.biases), dict(adapter.saved)) == ({}, {})
    raw = adapter.config.raw
    assert (raw["lora_bias"], raw["bias"], raw["modules_to_save"]) == (False, "none", None)


SAVED = [
    ({"head.weight": (3, 4), "head.bias": (3,)}, ["head"], "none", ["head.bias", "head.weight"]),
    ({"head.a.weight": (3, 4), "head.gate": (3,)}, ["head"], "none", ["head.a.weight", "head.gate"]),
    ({"a.weight": (3,), "ab.weight": (3,)}, ["a", "ab"], "none", ["a.weight", "ab.weight"]),
    ({f"{Q}.bias": (4,)}, None, "lora_only", [f"{Q}.base_layer.bias"]),
    ({f"{Q}.bias": (4,), "norm.bias": (3,)}, None, "all", [f"{Q}.base_layer.bias", "norm.bias"]),
    ({"norm.bias": (3,), f"{Q}.bias": (4,)}, None, "all", [f"{Q}.base_layer.bias", "norm.bias"]),
    ({"head.weight": (3, 4), "head.bias": (3,), f"{Q}.bias": (4,)}, ["head"], "lora_only",
     ["head.bias", "head.weight", f"{Q}.base_layer.bias"]),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "modules", "bias", "names"), SAVED)
def test_replaced_tensors_come_back_under_the_setting_that_peft_reads_them_by(tmp_path, shapes, modules, bias, names):
    given = {name: np.full(shape, place, np.float32) for place, (name, shape) in enumerate(shapes.items(), 2)}
    saving.save_lora(tmp_path, {Q: pair()}, base_model=None, saved=given)
    adapter = read_back(tmp_path, "/modules_to_save", "/bias")
    assert (adapter.config.raw["modules_to_save"], adapter.config.bias) == (modules, bias)
    assert sorted(name.removeprefix(P) for name in (*adapter.facts.saved, *adapter.facts.biases)) == sorted(names)
    assert adapter.saved.keys() == given.keys()
    assert all(np.array_equal(adapter.saved[name], value) for name, value in given.items())


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path):
    parts = {"biases": {Q: ones(4), V: ones(4)}, "saved": {"a.weight": ones(2), "b.weight": ones(3), "n.bias": ones(1)}}
    turned = {name: dict(reversed(part.items())) for name, part in parts.items()}
    saving.save_lora(tmp_path / "a", {Q: pair(), V: pair()}, base_model="b", **parts)
    saving.save_lora(tmp_path / "b", {V: pair(), Q: pair()}, base_model="b", **turned)
    gains = {Q: ones(4), V: ones(6)}
    saving.save_ia3(
        tmp_path / "c", gains, feedforward=[V, Q], base_model="b", saved={"a.weight": ones(2), "b.weight": ones(3)}
    )
    saving.save_ia3(tmp_path / "d", dict(reversed(gains.items())), feedforward={Q, V}, base_model="b",
                    saved={"b.weight": ones(3), "a.weight": ones(2)})  # fmt: skip
    for first, second in ("ab", "cd"):
        for name in (saving.CONFIG, saving.WEIGHTS):
            assert (tmp_path / first / name).read_bytes() == (tmp_path / second / name).read_bytes()


def refused(call) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        call()
    assert "dense delta" in caught.value.remedy
    return caught.value


def test_parts_that_one_adapter_cannot_hold_are_refused(tmp_path):
    both = refused(
        lambda: saving.save_lora(tmp_path, {Q: pair()}, base_model=None, saved={"layer.0.query.weight": ones(4, 6)})
    )
    assert both.met == Q
    inside = refused(lambda: saving.save_lora(tmp_path, {Q: pair()}, base_model=None, saved={"layer.0.gate": ones(4)}))
    assert inside.met == Q
    embedding = refused(lambda: saving.save_lora(
        tmp_path, {"e": pair(), Q: pair()}, base_model=None, biases={Q: ones(4)}, layouts={"e": Layout("embedding")}
    ))  # fmt: skip
    assert embedding.met == "e"
    alone = refused(
        lambda: saving.save_ia3(tmp_path, {Q: ones(4)}, feedforward=[], base_model=None, saved={"n.bias": ones(2)})
    )
    assert alone.met == f"{P}n.bias"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"biases": {V: ones(4)}}, "no delta"), ({"biases": {Q: ones(5)}}, "wanted"), ({"saved": {"weight": ones(5)}}, "no module")],
)  # fmt: skip
def test_parts_that_do_not_fit_cannot_be_saved(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        saving.save_lora(tmp_path, {Q: pair()}, base_model=None, **settings)
    with pytest.raises(ValueError, match="at least one"):
        saving.save_ia3(tmp_path, {}, feedforward=[], base_model=None)


def test_a_vector_is_written_on_the_side_it_multiplies_and_in_the_dtype_asked_for(tmp_path):
    gains = {Q: np.array([0.5, -1], np.float32), V: np.array([2, 3, 4], np.float32)}
    saving.save_ia3(tmp_path, gains, feedforward=[V, "stranger"], base_model="a/b", dtype="BF16",
                    extra={"task_type": "CAUSAL_LM", "peft_type": "LORA"})  # fmt: skip
    with files.open_file(tmp_path / saving.WEIGHTS) as file:
        assert {name: (file.info(name).dtype, file.float32(name).tolist()) for name in file.names} == {
            f"{P}{Q}.ia3_l": ("BF16", [[1.5], [0]]), f"{P}{V}.ia3_l": ("BF16", [[3, 4, 5]]),
        }  # fmt: skip
    raw = json.loads((tmp_path / saving.CONFIG).read_text())
    assert (raw["peft_type"], raw["task_type"], raw["feedforward_modules"]) == ("IA3", "CAUSAL_LM", [V])
    adapter = read_back(tmp_path)
    assert {name: (gain.values.tolist(), gain.is_feedforward) for name, gain in adapter.gains.items()} == {
        Q: ([0.5, -1], False), V: ([2, 3, 4], True),
    }  # fmt: skip


class Nested(torch.nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(4, 3)
        self.block = torch.nn.Module()
        self.block.fc = torch.nn.Linear(3, 4)

    def forward(self, values):
        return self.fc(self.block.fc(values))


def test_a_name_that_ends_another_does_not_move_a_vector_to_the_other_side(tmp_path):
    saving.save_ia3(tmp_path, {"fc": ones(4) * 2, "block.fc": ones(4) * 3}, feedforward=["fc"], base_model=None)
    assert read_back(tmp_path).facts.feedforward == {"fc"}
    values, plain = torch.ones(1, 3), Nested()
    with torch.no_grad():
        wanted = plain.fc(3 * 4 * plain.block.fc(values))
        assert torch.allclose(tiny.loaded(tmp_path, base=Nested)(values), wanted, atol=1e-5)
