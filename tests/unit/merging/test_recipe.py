"""Recipes: what is accepted, what is refused and how, and when two recipes are one."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import merging
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import base, recipe
from moerge.merging.base import Spec, integer


def body(**changes):
    return {
        "base_model": "acme/base",
        "method": "ties",
        "parameters": {"density": 0.3},
        "seed": 3,
        "experts": [expert("b", 0.3), expert("a", 0.7)],
        "output": {"kind": "lora", "rank": 8},
        **changes,
    }


def expert(letter, weight, **changes):
    return {"expert": f"acme/{letter}", "revision": letter * 40, "digest": letter * 64, "weight": weight, **changes}


def refused(values, error=RecipeInvalid):
    with pytest.raises(error) as caught:
        recipe.parse(values)
    assert caught.value.detail
    assert caught.value.wanted
    assert caught.value.remedy
    return caught.value


def test_a_recipe_is_read_with_every_default_filled_in_and_experts_in_order_of_digest():
    found = recipe.parse(body())
    assert found.method == "ties"
    assert [(item.expert, item.revision[0], item.weight) for item in found.experts] == [
        ("acme/a", "a", 0.7),
        ("acme/b", "b", 0.3),
    ]
    assert found.parameters.density == 0.3
    assert found.parameters.variant == "mergekit"
    assert (found.base_model, found.seed, found.output.rank, found.output.dtype) == ("acme/base", 3, 8, "float32")


def test_only_method_and_experts_are_needed():
    found = recipe.parse({"method": "linear", "experts": [expert("a", 1)]})
    assert (found.base_model, found.seed, found.output) == (None, 0, recipe.Output())


def test_canonical_bytes_are_stable():
    assert recipe.parse({"method": "cat", "experts": [expert("a", 1)], "seed": 9}).canonical() == (
        b'{"base_model":null,"experts":[{"digest":"' + b"a" * 64 + b'","expert":"acme/a","revision":"' + b"a" * 40
        + b'","weight":1.0}],"method":"cat","output":{"dtype":"float32","kind":"lora","rank":null},"parameters":{},'
        b'"version":1}'
    )  # fmt: skip


def test_a_recipe_survives_a_trip_through_json():
    found = recipe.parse(body())
    again = recipe.parse(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.digest == found.digest


@given(st.permutations(["a", "b", "c", "d"]), st.permutations(["method", "experts", "seed", "parameters"]))
def test_the_digest_does_not_depend_on_the_order_of_experts_or_fields(letters, fields):
    values = {
        "method": "dare",
        "seed": 4,
        "parameters": {"scale": 2.0, "density": 0.5},
        "experts": [expert(letter, ord(letter)) for letter in letters],
    }
    first = recipe.parse({**values, "experts": [expert(letter, ord(letter)) for letter in "abcd"]})
    assert recipe.parse({name: values[name] for name in fields}).digest == first.digest


def test_an_ordered_method_keeps_the_order_of_its_experts():
    forth = recipe.parse({"method": "opcm", "experts": [expert("b", 1), expert("a", 1)]})
    back = recipe.parse({"method": "opcm", "experts": [expert("a", 1), expert("b", 1)]})
    assert [item.expert for item in forth.experts] == ["acme/b", "acme/a"]
    assert forth.digest != back.digest


@pytest.mark.parametrize("method", ["slerp", "layer_swapping"])
def test_who_is_first_stays_first_where_positions_have_a_meaning(method):
    found = recipe.parse({"method": method, "experts": [expert("b", 1), expert("a", 1)]})
    assert [item.expert for item in found.experts] == ["acme/b", "acme/a"]


def test_two_texts_of_one_map_of_layers_are_one_recipe():
    texts = ["2-3,0 = 1; 1=0*1", "0=1;1=0;2-3=1;other=average", "2-3,0=1; 1=average"]
    one, other, third = (
        recipe.parse(body(method="layer_swapping", parameters={"layers": text})).digest for text in texts
    )
    assert one == other != third


def test_more_experts_than_a_method_takes_and_positions_that_nobody_has_are_refused():
    three = [expert(letter, 1) for letter in "abc"]
    for method in ("slerp", "nuslerp"):
        assert refused({"method": method, "experts": three}).pointer == "/experts"
        assert len(recipe.parse({"method": method, "experts": three[:2]}).experts) == 2
    swapped = {"method": "layer_swapping", "experts": three, "parameters": {"layers": "0=2; other=3"}}
    assert refused(swapped).pointer == "/parameters/layers"
    recipe.parse({**swapped, "parameters": {"layers": "0=2"}})


def test_weights_that_cancel_are_refused_by_methods_that_always_divide():
    for method in ("slerp", "nuslerp", "karcher", "layer_swapping"):
        found = refused({"method": method, "experts": [expert("a", 1), expert("b", -1)]})
        assert (found.pointer, found.remedy) == ("/experts", "Change the weights.")


def test_equal_numbers_are_equal_recipes():
    one = recipe.parse(body(parameters={"density": 1, "scale": 1}, experts=[expert("a", 1), expert("b", -0.0)]))
    other = recipe.parse(body(parameters={"density": 1.0}, experts=[expert("a", 1.0), expert("b", 0)]))
    assert one.digest == other.digest


def test_the_seed_counts_for_random_methods_alone():
    for method, counts in (("dare", True), ("della", True), ("ties", False), ("linear", False)):
        first, other = (recipe.parse(body(method=method, parameters={}, seed=seed)).digest for seed in (1, 2))
        assert (first != other) == counts, method


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dare"}, {"parameters": {"density": 0.31}}, {"base_model": "acme/other"},
        {"experts": [expert("b", 0.3), expert("a", 0.71)]}, {"experts": [expert("b", 0.7), expert("a", 0.3)]},
        {"experts": [expert("b", 0.3), expert("a", 0.7, digest="c" * 64)]},
        {"experts": [expert("b", 0.3), expert("a", 0.7, revision="c" * 40)]},
        {"output": {"rank": 9}}, {"output": {"rank": 8, "dtype": "bfloat16"}},
    ],
)  # fmt: skip
def test_whatever_changes_the_result_changes_the_digest(changes):
    assert recipe.parse(body(**changes)).digest != recipe.parse(body()).digest


def test_a_new_version_of_a_method_changes_the_digest():
    spec = merging.catalogue()["ties"]
    newer = Spec.from_dict({**spec.to_dict(), "version": spec.version + 1})
    assert recipe.parse(body(), specs={"ties": newer}).digest != recipe.parse(body()).digest


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"method": None}, "/method"),
        ({"method": 3}, "/method"),
        ({"method": ["ties"]}, "/method"),
        ({"parameters": None}, "/parameters"),
        ({"parameters": [1]}, "/parameters"),
        ({"parameters": {"density": 0}}, "/parameters/density"),
        ({"parameters": {"density": 1.01}}, "/parameters/density"),
        ({"parameters": {"density": True}}, "/parameters/density"),
        ({"parameters": {"density": "0.2"}}, "/parameters/density"),
        ({"parameters": {"density": None}}, "/parameters/density"),
        ({"parameters": {"density": float("nan")}}, "/parameters/density"),
        ({"parameters": {"variant": "Peft"}}, "/parameters/variant"),
        ({"parameters": {"normalize": 1}}, "/parameters/normalize"),
        ({"parameters": {"min_keep": 1.0}}, "/parameters/min_keep"),
        ({"seed": -1}, "/seed"),
        ({"seed": 1.5}, "/seed"),
        ({"seed": True}, "/seed"),
        ({"seed": None}, "/seed"),
        ({"seed": 2**63}, "/seed"),
        ({"base_model": ""}, "/base_model"),
        ({"base_model": 3}, "/base_model"),
        ({"experts": None}, "/experts"),
        ({"experts": []}, "/experts"),
        ({"experts": {"a": 1}}, "/experts"),
        ({"experts": [expert("a", 1)] * 101}, "/experts"),
        ({"experts": ["acme/a"]}, "/experts/0"),
        ({"experts": [expert("a", 1), expert("b", True)]}, "/experts/1/weight"),
        ({"experts": [expert("a", 1), expert("b", None)]}, "/experts/1/weight"),
        ({"experts": [expert("a", 1), expert("b", "1")]}, "/experts/1/weight"),
        ({"experts": [expert("a", float("inf"))]}, "/experts/0/weight"),
        ({"experts": [expert("a", float("nan"))]}, "/experts/0/weight"),
        ({"experts": [expert("a", 1e7)]}, "/experts/0/weight"),
        ({"experts": [expert("a", 10**400)]}, "/experts/0/weight"),
        ({"experts": [expert("a", 1, expert="")]}, "/experts/0/expert"),
        ({"experts": [expert("a", 1, revision=None)]}, "/experts/0/revision"),
        ({"experts": [expert("a", 1, digest=7)]}, "/experts/0/digest"),
        ({"output": None}, "/output"),
        ({"output": {"kind": "dense"}}, "/output/kind"),
        ({"output": {"kind": None}}, "/output/kind"),
        ({"output": {"rank": 0}}, "/output/rank"),
        ({"output": {"rank": 4.0}}, "/output/rank"),
        ({"output": {"rank": True}}, "/output/rank"),
        ({"output": {"rank": 4097}}, "/output/rank"),
        ({"output": {"dtype": "float64"}}, "/output/dtype"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_met_and_wanted(changes, pointer):
    assert refused(body(**changes)).pointer == pointer


@pytest.mark.parametrize(
    ("changes", "pointer", "remedy"),
    [
        ({"methods": "ties"}, "/methods", "Did you mean method?"),
        ({"method": "tie"}, "/method", "Did you mean ties?"),
        ({"method": "Linear"}, "/method", "Did you mean linear?"),
        ({"parameters": {"densty": 0.2}}, "/parameters/densty", "Did you mean density?"),
        ({"parameters": {"aggregate": "men"}}, "/parameters/aggregate", "Did you mean mean?"),
        ({"experts": [expert("a", 1, wieght=2)]}, "/experts/0/wieght", "Did you mean weight?"),
        ({"output": {"ranks": 3}}, "/output/ranks", "Did you mean rank?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_known_one(changes, pointer, remedy):
    error = refused(body(**changes))
    assert (error.pointer, error.remedy) == (pointer, remedy)


@pytest.mark.parametrize("values", [None, [], "ties", 3, {1: 2}])
def test_what_is_not_an_object_is_refused(values):
    assert refused(values).pointer == ""


def test_an_unknown_method_lists_all_known_ones():
    error = refused(body(method="frobnicate"))
    assert error.met == "frobnicate"
    assert error.wanted == "one of " + ", ".join(sorted(merging.catalogue()))


def test_a_long_value_is_not_repeated_in_full():
    assert len(refused(body(base_model=["x" * 10_000])).detail) < 300


def test_experts_of_two_bases_are_refused_by_name():
    experts = [expert("a", 1, base_model="acme/base"), expert("b", 1, base_model="acme/other")]
    for base_model in ("acme/base", None):
        error = refused(body(base_model=base_model, experts=experts), ExpertsIncompatible)
        assert (error.pointer, error.met, error.wanted) == ("/experts/1", "acme/other", "acme/base")
        assert "acme/b" in error.detail


def test_weights_that_cancel_are_refused_before_anything_is_computed():
    experts = [expert("a", 0.5), expert("b", -0.5)]
    error = refused(body(method="linear", parameters={"normalize": True}, experts=experts))
    assert error.pointer == "/experts"
    recipe.parse(body(method="linear", parameters={"normalize": False}, experts=experts))


def test_parameters_that_do_not_fit_together_are_refused():
    assert "density - epsilon" in refused(body(method="della", parameters={"density": 0.2, "epsilon": 0.2})).detail
    assert "density + epsilon" in refused(body(method="della", parameters={"density": 0.9, "epsilon": 0.2})).detail
    recipe.parse(body(method="della", parameters={"density": 0.9, "epsilon": 0.1}))


def test_cards_kept_as_rows_parse_as_those_installed():
    rows = {name: json.loads(json.dumps(spec.to_dict())) for name, spec in merging.catalogue().items()}
    specs = {name: Spec.from_dict(row) for name, row in rows.items()}
    assert recipe.parse(body(), specs=specs).digest == recipe.parse(body()).digest


def test_parsing_needs_neither_numpy_nor_torch():
    code = (
        "import sys; from moerge.merging import recipe; from moerge.merging.base import Spec\n"
        "spec = Spec(name='m', title='M', form='factor', summary='s.', when='w.', paper='p')\n"
        "recipe.parse({'method': 'm', 'experts': [{'expert': 'a/b', 'revision': 'r', 'digest': 'd', 'weight': 1}]},"
        " specs={'m': spec})\n"
        "assert not {'numpy', 'torch', 'django'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_catalogue_needs_no_torch():
    code = "import sys; from moerge import merging; merging.catalogue(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("rule", "wanted"), [("all", 45), ("sum", 20), ("largest", 40), ("dense", 20)])
def test_the_output_rank_follows_from_shapes_alone(rule, wanted):
    """Modules q of ranks 4 + 40 + 1 in a matrix of 20 rows, and v of 8 in one of 100."""
    ranks = [{"q": 4, "v": 8}, {"q": 40}, {"q": 1}]
    assert base.output_rank(rule, ranks, {"q": (20, 300), "v": (100, 100)}) == wanted


def test_dense_results_get_a_rank_of_64_at_most():
    ranks, shapes = [{"q": 40}, {"q": 50}], {"q": (500, 500)}
    assert base.output_rank("dense", ranks, shapes) == 64
    assert base.output_rank("sum", ranks, shapes) == 90


def test_a_whole_number_is_not_a_number_with_a_point():
    parameter = integer("count", default=2, minimum=1, maximum=3, help="How many.")
    assert parameter.check(3) == 3
    assert parameter.wanted() == "a whole number at least 1 and at most 3"
    with pytest.raises(RecipeInvalid):
        parameter.check(2.0)
