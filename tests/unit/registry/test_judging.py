"""Recipes judged from rows alone: adapters with very many modules."""

import time

from moerge.merging import recipe as recipes
from registry.models import BaseModel, Expert, Namespace, Revision
from registry.services import judging, layouts
from registry.services.parents import Parent

SHAPES = {
    f"model.layers.{layer}.mlp.experts.{number}.{part}": (768, 2048)
    for layer in range(48) for number in range(128) for part in ("gate_proj", "up_proj", "down_proj")
}  # fmt: skip


def parent(position: int, shapes: dict[str, tuple[int, int]]) -> Parent:
    expert = Expert(namespace=Namespace(name="ann"), name=f"e{position}")
    facts = {"layout": layouts.pack(shapes, dict.fromkeys(shapes, 4))}
    return Parent(position, f"{position:064x}", Revision(expert=expert, adapter_kind="lora", facts=facts))


def test_adapters_with_eighteen_thousand_modules_are_judged_within_a_second(settings) -> None:
    settings.HUB_MERGE_MEMORY_BYTES = 2**40
    fewer = {name: shape for name, shape in SHAPES.items() if ".127." not in name}
    parents = [parent(0, SHAPES), parent(1, SHAPES), parent(2, fewer)]
    body = {
        "method": "linear",
        "experts": [
            {"expert": one.name, "revision": "x", "digest": one.digest, "weight": 1.0} for one in parents
        ],
    }  # fmt: skip
    since = time.process_time()
    found = judging.judge(recipes.parse(body), parents, base=BaseModel(name="a/b"))
    assert time.process_time() - since < 1
    assert found.missing.keys() == {2}
    assert found.missing[2].count == 48 * 3
    assert len(found.missing[2].names) == 20
    assert found.missing[2].names[0] == "model.layers.0.mlp.experts.127.down_proj"
    assert found.cost is not None
    assert found.cost.rank == 12
    assert found.cost.written_bytes > 4 * 12 * len(SHAPES) * (768 + 2048)
