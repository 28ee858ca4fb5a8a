"""Recipes judged from rows alone: adapters with very many modules, and parts that do not go together."""

import time

import pytest

from moerge.merging import recipe as recipes
from registry.errors import ExpertsIncompatible
from registry.models import BaseModel, Expert, Namespace, Revision
from registry.services import judging, layouts
from registry.services.parents import Parent

SHAPES = {
    f"model.layers.{layer}.mlp.experts.{number}.{part}": (768, 2048)
    for layer in range(48) for number in range(128) for part in ("gate_proj", "up_proj", "down_proj")
}  # fmt: skip


HEAD = {"base_model.model.lm_head.weight": [61, 48]}


def parent(
    position: int, shapes: dict[str, tuple[int, int]], *, saved: dict[str, list[int]] | None = None, rank: int = 4
) -> Parent:
    expert = Expert(namespace=Namespace(name="ann"), name=f"e{position}")
    facts = {"layout": layouts.pack(shapes, dict.fromkeys(shapes, rank)), "saved_shapes": saved or {}}
    return Parent(position, f"{position:064x}", Revision(expert=expert, adapter_kind="lora", facts=facts))


def judged(parents: list[Parent], *, method: str = "linear", **output: str) -> judging.Judgement:
    experts = [{"expert": one.name, "revision": "x", "digest": one.digest, "weight": 1.0} for one in parents]
    recipe = recipes.parse({"method": method, "experts": experts, "output": output})
    return judging.judge(recipe, parents, base=BaseModel(name="a/b"))


def test_adapters_with_eighteen_thousand_modules_are_judged_within_a_second(settings) -> None:
    settings.HUB_MERGE_MEMORY_BYTES = 2**40
    fewer = {name: shape for name, shape in SHAPES.items() if ".127." not in name}
    parents = [parent(0, SHAPES), parent(1, SHAPES), parent(2, fewer)]
    since = time.process_time()
    found = judged(parents)
    assert time.process_time() - since < 1
    assert found.missing.keys() == {2}
    assert found.missing[2].count == 48 * 3
    assert len(found.missing[2].names) == 20
    assert found.missing[2].names[0] == "model.layers.0.mlp.experts.127.down_proj"
    assert found.cost is not None
    assert found.cost.rank == 12
    assert found.cost.written_bytes > 4 * 12 * len(SHAPES) * (768 + 2048)


@pytest.mark.parametrize("kind", ["delta", "ternary"])
def test_a_replaced_tensor_is_no_delta_without_the_weights_of_the_base(kind: str) -> None:
    one = parent(0, {"layers.0.q_proj": (48, 48)}, saved=HEAD)
    with pytest.raises(ExpertsIncompatible, match=r"ann/e0 replaces lm_head\.weight of the base") as caught:
        judged([one], kind=kind)
    assert [fault.pointer for fault in caught.value.faults] == ["/output/kind"]
    assert judged([one]).recipe.base_weights is None


@pytest.mark.parametrize(("module", "fits"), [("lm_head", False), ("lm_head.inner", False), ("layers.lm_head", True)])
def test_a_module_is_not_replaced_and_changed_at_once(module: str, fits: bool) -> None:
    both = [parent(0, {"layers.0.q_proj": (48, 48)}, saved=HEAD), parent(1, {module: (61, 48)})]
    if fits:
        assert judged(both).cost is not None
        return
    with pytest.raises(ExpertsIncompatible, match=f"ann/e0 replaces {module} as a whole, and ann/e1") as caught:
        judged(both)
    assert [fault.pointer for fault in caught.value.faults] == ["/experts/1/expert"]


@pytest.mark.parametrize("method", ["peft_linear", "peft_ties", "peft_dare_ties", "svd", "ties"])
def test_methods_that_merge_factors_apart_take_equal_ranks_alone(method: str) -> None:
    module = {"layers.0.q_proj": (48, 48)}
    assert judged([parent(0, module), parent(1, module)], method=method).cost is not None
    two = [parent(0, module), parent(1, module, rank=5)]
    if not method.startswith("peft_"):
        assert judged(two, method=method).cost is not None
        return
    with pytest.raises(ExpertsIncompatible, match="q_proj has rank 5 in ann/e1 and 4 in ann/e0") as caught:
        judged(two, method=method)
    assert [fault.pointer for fault in caught.value.faults] == ["/experts/1/expert"]
