"""Packs: the same bytes for the same experts, and nothing but a sound pack is read."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from moerge.errors import PackInvalid
from moerge.routing import packs, prototypes
from moerge.routing.packs import Member, Pack
from moerge.tensors.kind import LowRank

Q, V = "layers.0.q", "layers.0.v"


def unit(rng, width):
    values = rng.normal(size=width)
    return (values / np.linalg.norm(values)).astype(np.float32)


def member(name, **changes):
    fields = {"expert": name, "revision": "c" * 40, "sha256": "a" * 64, "rank": 4, "scale": 2.0,
              "target_modules": ("q", "v")}  # fmt: skip
    return Member(**{**fields, **changes})


@pytest.fixture
def pack():
    """Three experts: the second has no delta in V and no gates, the third no embedding."""
    rng = np.random.default_rng(0)
    rows = [{Q: unit(rng, 8), V: unit(rng, 6)}, {Q: unit(rng, 8)}, {Q: unit(rng, 8), V: unit(rng, 6)}]
    arrow, arrow_masks = packs.stacked(rows)
    phatgoose, gate_masks = packs.stacked([{Q: 1e-6 * unit(rng, 8)}, {}, {Q: unit(rng, 8), V: 3 * unit(rng, 6)}])
    glider = np.stack([unit(rng, 5), unit(rng, 5), np.zeros(5, np.float32)])
    return Pack(
        base_model="acme/base", base_revision="main", encoder="minilm", kinds=packs.KINDS,
        members=(member("ann/tea"), member("bob/tea", rank=8), member("cem/tea")),
        arrow=arrow, arrow_sigma={Q: np.array([3, 2, 1], np.float32), V: np.array([5, 0, 4], np.float32)},
        phatgoose=phatgoose, masks={"arrow": arrow_masks, "phatgoose": gate_masks}, glider_global=glider,
        glider_mask=np.array([True, True, False]), top_k=3, temperature=0.5, alpha=100.0,
    )  # fmt: skip


def test_a_pack_comes_back_as_it_was(pack):
    back = packs.read(packs.write(pack))
    assert back.members == pack.members
    for name in ("base_model", "base_revision", "encoder", "kinds", "top_k", "temperature", "alpha"):
        assert getattr(back, name) == getattr(pack, name)
    for module in (Q, V):
        np.testing.assert_allclose(back.arrow[module], pack.arrow[module], atol=3e-4)
        np.testing.assert_array_equal(back.arrow_sigma[module], pack.arrow_sigma[module])
        np.testing.assert_array_equal(back.phatgoose[module], pack.phatgoose[module])
        for kind in ("arrow", "phatgoose"):
            np.testing.assert_array_equal(back.masks[kind][module], pack.masks[kind][module])
    np.testing.assert_allclose(back.glider_global, pack.glider_global, atol=3e-4)
    np.testing.assert_array_equal(back.glider_mask, [True, True, False])


def test_the_file_is_what_its_format_says(pack, tmp_path):
    path = tmp_path / "pack.safetensors"
    path.write_bytes(packs.write(pack))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert tensors[f"arrow/{Q}"].dtype == np.float16
    assert tensors[f"arrow/{Q}"].shape == (3, 8)
    assert tensors[f"mask/arrow/{V}"].tolist() == [1, 0, 1]
    assert tensors[f"mask/arrow/{V}"].dtype == np.uint8
    assert tensors[f"mask/phatgoose/{Q}"].tolist() == [1, 0, 1]
    assert not tensors[f"arrow/{V}"][1].any()
    assert tensors[f"arrow_sigma/{V}"].tolist() == [5, 0, 4]
    assert tensors["mask/glider_global"].tolist() == [1, 1, 0]
    assert [row["expert"] for row in json.loads(metadata["experts"])] == ["ann/tea", "bob/tea", "cem/tea"]
    assert json.loads(metadata["differing"]) == ["bob/tea"]
    assert metadata["format"] == "moerge-pack/1"


def test_the_same_pack_gives_the_same_bytes(pack):
    assert packs.write(pack) == packs.write(packs.read(packs.write(pack)))


def test_small_gates_do_not_vanish(pack):
    assert packs.read(packs.write(pack)).phatgoose[Q][0].any()


def test_one_kind_alone_is_a_pack(pack):
    alone = Pack(base_model="b", members=pack.members, kinds=("phatgoose",), phatgoose=pack.phatgoose,
                 masks={"phatgoose": pack.masks["phatgoose"]})  # fmt: skip
    back = packs.read(packs.write(alone))
    assert not back.arrow
    assert back.glider_global is None
    assert list(back.phatgoose) == [Q, V]


def test_prototypes_of_several_adapters_become_rows_in_their_order():
    rng = np.random.default_rng(2)
    found = [
        prototypes.of_deltas({name: LowRank(rng.normal(size=(2, 8)).astype(np.float32),
                                            rng.normal(size=(6, 2)).astype(np.float32), 1.0) for name in names})
        for names in ((Q, V), (V,), (Q,))
    ]  # fmt: skip
    vectors, sigmas, masks = packs.of_prototypes(found)
    assert masks[Q].tolist() == [True, False, True]
    assert masks[V].tolist() == [True, True, False]
    np.testing.assert_array_equal(vectors[V][1], found[1].modules[V].vector)
    np.testing.assert_allclose(sigmas[Q], [found[0].modules[Q].sigma, 0, found[2].modules[Q].sigma])


def test_two_widths_for_one_module_are_refused():
    with pytest.raises(PackInvalid) as caught:
        packs.stacked([{Q: np.ones(8, np.float32)}, {Q: np.ones(9, np.float32)}])
    assert (caught.value.pointer, caught.value.met) == (Q, [8, 9])


def damaged(pack, change, **metadata):
    """The pack with its tensors changed by hand, written by the reference library."""
    data = packs.write(pack)
    tensors = {name: values.copy() for name, values in load(data).items()}
    change(tensors)
    length = int.from_bytes(data[:8], "little")
    said = {**json.loads(data[8 : 8 + length])["__metadata__"], **metadata}
    with pytest.raises(PackInvalid) as caught:
        packs.read(save(tensors, {name: value for name, value in said.items() if value is not None}))
    return caught.value


def put(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def cut(name):
    def change(tensors):
        tensors[name] = tensors[name][:2].copy()

    return change


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        (put(f"mask/arrow/{V}", 1, 1), f"mask/arrow/{V}"),
        (put(f"mask/arrow/{V}", 0, 0), f"mask/arrow/{V}"),
        (put(f"mask/phatgoose/{Q}", 0, 2), f"mask/phatgoose/{Q}"),
        (put(f"arrow/{Q}", (0, 0), np.nan), f"arrow/{Q}"),
        (put(f"arrow/{Q}", 0, 0.9), f"arrow/{Q}"),
        (put(f"arrow_sigma/{Q}", 0, 0), f"arrow_sigma/{Q}"),
        (put(f"arrow_sigma/{Q}", 0, -1), f"arrow_sigma/{Q}"),
        (put("glider_global", 0, 0.9), "glider_global"),
        (cut(f"arrow/{Q}"), f"arrow/{Q}"),
        (cut(f"mask/arrow/{Q}"), f"mask/arrow/{Q}"),
        (cut(f"arrow_sigma/{V}"), f"arrow_sigma/{V}"),
        (lambda tensors: tensors.pop(f"mask/arrow/{Q}"), f"mask/arrow/{Q}"),
        (lambda tensors: tensors.pop(f"arrow_sigma/{Q}"), f"arrow_sigma/{Q}"),
        (lambda tensors: tensors.pop("glider_global"), "glider_global"),
        (lambda tensors: tensors.pop(f"arrow/{Q}"), f"arrow_sigma/{Q}"),
        (lambda tensors: tensors.update(other=np.ones(1, np.float32)), "other"),
    ],
)
def test_a_pack_with_a_wrong_tensor_is_refused_by_its_name(pack, change, pointer):
    assert damaged(pack, change).pointer == pointer


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", "moerge-pack/2"), ("format", None), ("kinds", '["arrow"'), ("kinds", "[]"), ("kinds", '["glider"]'),
     ("kinds", '["phatgoose","arrow","glider_global"]'), ("experts", "[]"), ("experts", '{"a":1}'), ("top_k", "0"),
     ("top_k", "two"), ("temperature", "-1"), ("temperature", "nan"), ("alpha", "inf"), ("alpha", None)],
)  # fmt: skip
def test_a_pack_with_wrong_metadata_is_refused_by_its_field(pack, name, value):
    assert damaged(pack, lambda _: None, **{name: value}).pointer == f"__metadata__/{name}"


def test_a_pack_of_fewer_experts_than_rows_is_refused(pack):
    rows = json.loads(json.dumps([vars(one) for one in pack.members[:2]]))
    damaged(pack, lambda _: None, experts=json.dumps(rows))
    rows[0].pop("sha256")
    assert damaged(pack, lambda _: None, experts=json.dumps(rows)).pointer == "__metadata__/experts/0"


def test_bytes_that_are_cut_or_no_file_at_all_are_refused(pack):
    data = packs.write(pack)
    for bad in (b"", b"PK\x03\x04", data[:100], data[:-1], data + b"x"):
        with pytest.raises(PackInvalid):
            packs.read(bad)
