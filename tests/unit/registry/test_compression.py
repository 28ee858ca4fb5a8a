"""Which compressed form a query, an upload or a card means, and what is refused with met and wanted."""

import pytest

from registry.checks import cards, compression
from registry.checks.compression import Choice, Form
from registry.errors import RequestInvalid, UploadInvalid

SMALL, LARGE = 22_000_000, 20 * 10**9


def asked(**query: str) -> Choice | None:
    return compression.asked(preset=query.get("preset"), density=query.get("density"))


def test_a_query_without_preset_and_density_means_the_own_form() -> None:
    assert asked() is None


@pytest.mark.parametrize(
    ("query", "form"),
    [
        ({"density": "0.1"}, Form("default", 0.1)),
        ({"density": ".30"}, Form("default", 0.3)),
        ({"density": "0.1234"}, Form("default", 0.1234)),
        ({"density": "0.05", "preset": "paper"}, Form("paper", 0.05)),
        ({"density": "0.05", "preset": "hq"}, Form("hq", 0.05)),
        ({"preset": "int4"}, Form("int4", 1.0)),
        ({"preset": "default"}, Form("default", 0.2)),
    ],
)
def test_a_query_names_a_form(query: dict[str, str], form: Form) -> None:
    found = asked(**query)
    assert found is not None
    assert found.form(SMALL) == form


@pytest.mark.parametrize(
    "density", ["0", "1", "1.5", "-0.1", "10", "20", "nan", "inf", "1e-1", "0.12345", "", "a", "0_1", "0.1 ", "٠.١"]
)
def test_a_density_that_is_no_share_is_refused_with_the_ones_that_are_had(density: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        asked(density=density)
    (fault,) = caught.value.faults
    assert fault.pointer == "?density"
    assert fault.met == density or fault.met == float(density)
    assert "0.05, 0.1, 0.2, 0.3 or 0.5" in fault.wanted


def test_an_unknown_preset_and_a_density_of_int4_are_refused() -> None:
    with pytest.raises(RequestInvalid) as caught:
        asked(preset="zip")
    assert (caught.value.faults[0].met, caught.value.faults[0].wanted) == ("zip", "one of default, paper, hq, int4")
    with pytest.raises(RequestInvalid, match="int4 keeps every value"):
        asked(preset="int4", density="0.1")


def test_only_five_densities_of_the_preset_default_are_standard() -> None:
    standard = [density / 100 for density in range(1, 100) if Form("default", density / 100).is_standard]
    assert standard == [0.05, 0.1, 0.2, 0.3, 0.5]
    for form in (Form("paper", 0.1), Form("hq", 0.1), Form("int4", 1.0), Form("default", 0.1, "norm")):
        assert not form.is_standard


def test_without_a_density_the_size_of_the_base_decides() -> None:
    assert [Choice().form(count).density for count in (None, SMALL, 10**9, LARGE)] == [0.2, 0.2, 0.1, 0.05]
    assert Choice("paper", 0.5).form(LARGE).density == 0.5


def test_a_rule_or_an_alpha_of_its_own_makes_another_form_and_the_presets_own_does_not() -> None:
    def form(**given: object) -> Form:
        return compression.parse({"density": 0.1, **given}, pointer="/", error=RequestInvalid).form(SMALL)

    assert form(scale_rule="unbiased") == form() == Form("default", 0.1)
    assert form(scale_rule="norm") == Form("default", 0.1, "norm")
    assert form(scale_rule="hq") == form(preset="hq") == Form("hq", 0.1)
    assert form(preset="paper", alpha=1) == form(preset="paper", scale_rule="sigma") == Form("paper", 0.1)
    assert form(preset="paper", alpha=5) == Form("paper", 0.1, "alpha=5")
    assert len({form(scale_rule=rule).key for rule in ("unbiased", "norm", "proj", "geo", "mse")}) == 5


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({"density": True}, "density"),
        ({"density": "0.1"}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": 1}, "density"),
        ({"preset": 3}, "preset"),
        ({"preset": ["default"]}, "preset"),
        ({"scale_rule": "sigma"}, "scale_rule"),
        ({"scale_rule": ["norm"]}, "scale_rule"),
        ({"preset": "paper", "scale_rule": "norm"}, "scale_rule"),
        ({"preset": "int4", "scale_rule": "norm"}, "scale_rule"),
        ({"alpha": 2}, "alpha"),
        ({"preset": "paper", "scale_rule": "stc", "alpha": 2}, "alpha"),
        ({"preset": "paper", "alpha": 0}, "alpha"),
        ({"preset": "paper", "alpha": 1001}, "alpha"),
        ({"density": 0.1, "speed": "fast"}, "speed"),
    ],
)
def test_a_wrong_choice_is_refused_at_its_field(given: dict[str, object], pointer: str) -> None:
    with pytest.raises(UploadInvalid) as caught:
        compression.parse(given, pointer="/compression/", error=UploadInvalid)
    assert caught.value.faults[0].pointer == f"/compression/{pointer}"
    assert caught.value.faults[0].wanted


def test_what_was_chosen_comes_back_out_of_a_jobs_parameters() -> None:
    for choice in (Choice(), Choice("paper", 0.1, "sigma", 5.0), Choice("int4"), Choice("default", 0.05, "norm")):
        assert Choice.of({**choice.as_dict(), "extra": True}) == choice
        assert None not in choice.as_dict().values()


FRONT = "---\nmoerge:\n  task: Sorts teas.\n  compression: {choice}\n---\n"


def test_a_card_chooses_its_form_and_what_is_given_beside_it_wins() -> None:
    card = cards.parse(FRONT.format(choice="{preset: paper, density: 0.1}"))
    assert card.compression == Choice("paper", 0.1)
    given = cards.overrides({"compression": {"density": 0.05}})
    assert cards.merged(card, given).compression == Choice("default", 0.05)
    assert cards.merged(card, {}).compression == Choice("paper", 0.1)
    assert cards.parse("---\nmoerge: {task: Teas.}\n---\n").compression is None


@pytest.mark.parametrize(
    ("choice", "pointer"),
    [("{density: 2}", "/README.md/moerge/compression/density"), ("[0.1]", "/README.md/moerge/compression")],
)
def test_a_card_with_a_wrong_choice_is_refused(choice: str, pointer: str) -> None:
    with pytest.raises(UploadInvalid) as caught:
        cards.parse(FRONT.format(choice=choice))
    assert caught.value.faults[0].pointer == pointer


METRICS = """---
model-index:
- name: tea
  results:
  - dataset: {name: Teas}
    metrics:
    - {type: accuracy, name: Accuracy of the untouched base, value: 0.5}
    - {type: accuracy, value: 0.9, args: {n: 200}}
    - {type: accuracy, value: 0.85, args: {n: 200, compression: {preset: default, density: 0.1}}}
    - {type: accuracy, value: 0.88, args: {compression: {preset: int4}}}
    - {type: accuracy, value: 0.1, args: {compression: {preset: zip, density: 0.1}}}
    - {type: accuracy, value: 0.2, args: {compression: {preset: default}}}
    - {type: accuracy, value: 0.3, args: {compression: 0.1}}
---
"""


def test_figures_of_compressed_forms_carry_preset_and_density_and_unknown_forms_are_left_out() -> None:
    found = [
        (one.value, one.base_value, one.row_count, one.preset, one.density) for one in cards.parse(METRICS).figures
    ]
    assert found == [
        (0.9, 0.5, 200, None, None),
        (0.85, 0.5, 200, "default", 0.1),
        (0.88, 0.5, None, "int4", 1.0),
    ]
