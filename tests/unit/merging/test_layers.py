"""Maps of layers: what they mean, their one text, and what is refused."""

import pytest

from moerge import merging
from moerge.errors import RecipeInvalid
from moerge.merging import arrays, layers
from tests.unit.merging import builders
from tests.unit.merging.builders import dense_of


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (layers.EXAMPLE, "0-3=0; 4-5=average; 6-27=1; 28-31=0; other=average"),
        (" 5 = 1 ;0-4=0", "0-4=0; 5=1; other=average"),
        ("0=1*0.5+0*1; other=1*-2.25+0", "0=0+1*0.5; other=0+1*-2.25"),
        ("007=0; other=2", "7=0; other=2"),
        ("3-3=average", "3=average; other=average"),
        ("0=0*0.00001+1*123456", "0=0*0.00001+1*123456; other=average"),
        ("0=0*0.1+1*0.30000000000000004", "0=0*0.1+1*0.30000000000000004; other=average"),
        ("0=0*-0.0+1", "0=0*0+1; other=average"),
        ("other=average", "other=average"),
    ],
)
def test_one_map_has_one_text_which_reads_back_as_itself(text, wanted):
    assert str(layers.parse(text)) == wanted
    assert str(layers.parse(wanted)) == wanted
    assert layers.parse(wanted) == layers.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "0=", "=0", "0=0;", "0-4=0; 4=1", "1-9=0; 3=1", "5-4=0", "-1=0", "0=-1", "0=0+0", "0=0*", "0=0*1e3", "0=0*nan",
        "other=0; other=1", "0=somebody", "0=average+1", "a=0", "0,=0", "12345=0", "0=0; other", "0=0;" * 300 + "other=0",
    ],
)  # fmt: skip
def test_a_text_that_is_no_map_is_refused_with_an_example(text):
    assert layers.parse(text) is None
    with pytest.raises(RecipeInvalid) as caught:
        merging.catalogue()["layer_swapping"].parse({"layers": text})
    assert layers.EXAMPLE in caught.value.wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.4.self_attn.q_proj", {1: 1.0}), ("layers.3.experts.4.w", {0: 1.0}), ("4", {1: 1.0}), ("h.5", {1: 1.0}),
        ("layers.6.w", None), ("lm_head", None), ("layer4.w", None), ("q4.5x.w", None), ("encoder.block.0.w4.q", {0: 1.0}),
    ],
)  # fmt: skip
def test_the_layer_of_a_tensor_is_the_first_number_in_its_path(name, wanted):
    assert layers.parse("0-3=0; 4-5=1").of(name) == wanted


def test_an_expert_that_is_not_there_is_refused_before_anything_is_computed():
    with pytest.raises(RecipeInvalid, match="names expert 2, and here are 2") as caught:
        arrays.merge("layer_swapping", builders.dense(2), parameters={"layers": "0=0; 1=0*0.5+2*0.5"})
    assert caught.value.pointer == "/parameters/layers"
    with pytest.raises(RecipeInvalid, match="names expert 1, and here are 1"):
        arrays.merge("layer_swapping", builders.dense(1), parameters={"layers": "other=1"})


def test_a_layer_taken_from_one_expert_is_its_delta_at_its_own_rank():
    first, second = builders.low_rank(2, names=("m.0.q", "m.1.q"))
    merged = arrays.merge("layer_swapping", [first, second], parameters={"layers": "0=1; 1=0"})
    assert [merged[name].rank for name in ("m.0.q", "m.1.q")] == [2, 3]
    turned = arrays.merge("layer_swapping", [second, first], parameters={"layers": "0=0; 1=1"})
    for name, found in dense_of(merged).items():
        own = builders.delta_of((second if "0" in name else first)[name])
        assert abs(found - own).max() < 1e-5
        assert (dense_of(turned)[name] == found).all()
