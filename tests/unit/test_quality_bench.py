"""The measurement of accuracy after compression: its statistics, its cache, its arithmetic, and one small run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as runner
from benchmarks import compeft_quality
from benchmarks.quality import results, statistics, tasks
from benchmarks.quality.cache import Cache
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.results import Measured, Results

ROOT = Path(__file__).resolve().parents[2]
# PEFT 0.21.2 asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def outcome(correct, nll):
    return Outcome(np.array(correct, bool), np.array(nll, np.float32))


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")


def test_a_spread_is_the_mean_and_the_standard_error_of_n_minus_1():
    # Squares of distances from 3: 4 + 0 + 4, over 2 is 4, the root 2, over the root of 3.
    found = statistics.spread([1.0, 3.0, 5.0])
    assert found.mean == 3
    assert found.error == pytest.approx(2 / math.sqrt(3))


def test_one_value_has_no_standard_error_and_none_no_mean():
    assert statistics.spread([7.0]) == statistics.Spread(7.0, None)
    with pytest.raises(ValueError, match="no values"):
        statistics.spread([])


def test_a_paired_difference_averages_seeds_within_rows_and_rows_within_seeds():
    values = [np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])]
    originals = [np.array([1.0, 1.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])]
    found = statistics.paired(values, originals)
    # Differences by seed: 0 -1 0 -1 and 1 0 0 0; by row .5 -.5 0 -.5, mean -1/8; by seed -1/2 and 1/4.
    assert found.mean == pytest.approx(-0.125)
    squares = 0.625**2 + 2 * 0.375**2 + 0.125**2
    assert found.rows == pytest.approx(math.sqrt(squares / 3) / 2)
    assert found.seeds == pytest.approx(math.sqrt(2 * 0.375**2 / 1) / math.sqrt(2))


def test_a_paired_difference_of_equal_rows_has_no_error_however_hard_the_rows_are():
    hard = [np.array([0.0, 9.0, 2.0]), np.array([1.0, 8.0, 0.0])]
    assert statistics.paired([row + 0.5 for row in hard], hard) == statistics.Paired(0.5, 0.0, 0.0)


def test_seeds_that_are_missing_on_one_side_are_refused():
    with pytest.raises(ValueError, match="1 seeds against 2"):
        statistics.paired([np.zeros(3)], [np.zeros(3), np.zeros(3)])


@pytest.fixture
def result():
    original = Measured("original", (outcome([1, 1, 1, 0], [0.1, 0.2, 0.3, 2.0]), outcome([1, 1, 0, 0], [0.1] * 4)))
    smaller = Measured(
        "default, k = 20%",
        (outcome([1, 1, 0, 0], [0.2, 0.2, 0.5, 2.1]), outcome([1, 0, 0, 0], [0.3] * 4)),
        ratio=17.25,
        cosine=0.6,
    )
    return Results("lora", "sst2", (original, smaller))


def test_rows_give_accuracy_differences_and_errors_in_the_shape_of_every_bench(result):
    rows = {row["name"]: row for row in results.rows([result])}
    name = "lora sst2, default, k = 20%"
    accuracy = rows[f"{name}: accuracy"]
    assert set(accuracy) == {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "met"}
    assert (accuracy["value"], accuracy["unit"], accuracy["peer"]) == (37.5, "%", "original")
    assert (accuracy["peer_value"], accuracy["ratio"]) == (62.5, 0.6)
    assert rows["lora sst2, original: accuracy"]["peer"] is None
    assert rows[f"{name}: accuracy, standard error over seeds"]["value"] == 12.5
    difference = f"{name}: paired difference of accuracy"
    assert rows[difference]["value"] == -25
    # By row, over both seeds: 0, -50, -50, 0.
    assert rows[f"{difference}, standard error over rows"]["value"] == pytest.approx(math.sqrt(2500 / 3) / 2, abs=1e-4)
    assert rows[f"{difference}, standard error over seeds"]["value"] == 0
    assert rows[f"{name}: NLL"]["value"] == pytest.approx(0.525)
    assert rows[f"{name}: paired difference of NLL"]["value"] == pytest.approx((0.1 + 0.0 + 0.2 + 0.1 + 0.8) / 8)
    assert rows[f"{name}: smaller than bf16"]["value"] == 17.25
    assert rows[f"{name}: cosine"]["value"] == 0.6
    assert f"{name}, original: paired difference of accuracy" not in rows
    assert {row["target"] for row in rows.values()} == {None}


@pytest.mark.parametrize(("lost", "met"), [(1, True), (2, False), (0, True)])
def test_a_demo_expert_may_lose_one_point_at_the_default_density(lost, met):
    right = np.ones(100, bool)
    worse = right.copy()
    worse[:lost] = False
    sides = [Measured("original", (outcome(right, np.zeros(100)),))]
    sides += [Measured(f"default, k = {density}%", (outcome(worse, np.zeros(100)),)) for density in (20, 5)]
    rows = results.rows([Results("demo", "x", tuple(sides))])
    judged = [row for row in rows if row["target"] is not None]
    assert [(row["name"], row["target"], row["met"]) for row in judged] == [
        ("demo x, default, k = 20%: paired difference of accuracy", -1.0, met)
    ]


def test_one_seed_gives_no_rows_of_errors_over_seeds():
    alone = Results(
        "demo", "x", (Measured("original", (outcome([1, 0], [1, 2]),)), Measured("b", (outcome([1, 1], [1, 1]),)))
    )
    names = {row["name"] for row in results.rows([alone])}
    assert "demo x, b: paired difference of accuracy, standard error over rows" in names
    assert not any("over seeds" in name for name in names)


def test_the_table_has_a_line_per_variant_with_both_errors(result):
    lines = results.markdown([result]).splitlines()
    assert lines[0] == "**lora, sst2** (4 rows, 2 seeds)"
    assert lines[4].startswith("| original | 62.50 ± 12.50 |  | 0.375 ± 0.275 |")
    assert lines[5] == (
        "| default, k = 20 % | 37.50 ± 12.50 | -25.00 ± 14.43 / 0.00 | 0.525 ± 0.225 | +0.150 ± 0.020 / 0.050 "
        "| 17.2x | 0.600 |"
    )


def test_pooled_results_hold_the_rows_of_all_tasks():
    one, other = (
        Results(
            "merge ties",
            name,
            (Measured("original", (outcome([1] * n, [0] * n),)), Measured("x", (outcome([0] * n, [1] * n),))),
        )
        for name, n in (("a", 1), ("b", 3))
    )
    pooled = results.pooled([one, other], "both")
    assert (pooled.kind, pooled.task) == ("merge ties", "both")
    assert pooled.measured[0].outcomes[0].correct.tolist() == [True] * 4
    assert pooled.measured[1].outcomes[0].nll.tolist() == [1] * 4
    assert pooled.points(pooled.measured[1]).mean == -100


def test_an_outcome_is_computed_once_and_again_only_for_other_inputs(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return outcome([1, 0], [0.5, 1.5])

    cache = Cache(tmp_path / "outcomes")
    first = cache.outcome(("head", "a", "b"), compute)
    again = Cache(tmp_path / "outcomes").outcome(("head", "a", "b"), compute)
    assert len(calls) == 1
    assert again.correct.tolist() == first.correct.tolist() == [True, False]
    assert again.nll.tolist() == [0.5, 1.5]
    cache.outcome(("head", "ab", ""), compute)
    assert len(calls) == 2


def test_an_outcome_that_was_interrupted_leaves_nothing_that_counts(tmp_path):
    def broken():
        raise KeyboardInterrupt

    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.outcome(("a",), broken)
    assert list(tmp_path.iterdir()) == []
    assert cache.outcome(("a",), lambda: outcome([1], [0])).accuracy == 1


def test_rows_are_read_with_the_numbers_of_their_sorted_labels(tmp_path):
    write_csv(tmp_path / "sst2_train.csv", [("b, c", "positive"), ("d", "negative")])
    write_csv(tmp_path / "sst2_test.csv", [("e", "positive"), ("f", "negative"), ("g", "positive")])
    task = tasks.read(tmp_path, "sst2")
    assert task.label_names == ("negative", "positive")
    assert (task.train.texts, task.train.labels) == (("b, c", "d"), (1, 0))
    assert task.test.labels == (1, 0, 1)
    assert task.test.sha256 != tasks.Rows(task.test.texts, (1, 0, 0)).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sst2_train.csv", "text,label\n", "sst2_train.csv has no rows"),
        ("sst2_test.csv", "words,label\na,positive\n", "wanted text and label"),
        ("sst2_test.csv", "text,label\na,neutral\n", "sst2_train.csv lacks: neutral"),
    ],
)
def test_data_that_cannot_be_measured_on_is_named(tmp_path, capsys, name, content, message):
    for split in ("train", "test"):
        write_csv(tmp_path / f"sst2_{split}.csv", [("a", "positive"), ("b", "negative")])
    (tmp_path / name).write_text(content, encoding="utf-8")
    given = ["compeft-quality", "--data", str(tmp_path), "--kinds", "lora", "--tasks", "sst2"]
    assert runner.main(given) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_data_exits_1_before_anything_is_trained(tmp_path, capsys):
    assert runner.main(["compeft-quality", "--data", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "banking77_train.csv" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--data", ".", "--kinds", "lora,qlora"],
        ["--data", ".", "--tasks", "mnli"],
        ["--data", ".", "--seeds", "0"],
        ["--data", ".", "--rows", "many"],
        ["--data", ".", "--densities", "0.2,1"],
        ["--data", ".", "--densities", "0"],
    ],
)
def test_wrong_usage_exits_2(given, capsys):
    with pytest.raises(SystemExit) as caught:
        runner.main(["compeft-quality", *given])
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def base():
    from benchmarks.quality import encoder

    return encoder.load_base()


def test_features_keep_the_order_of_texts_and_know_no_padding(base):
    from benchmarks.quality import encoder

    texts = ["a rather long message about a lost card and a late refund", "short", "where is my card", "hello there"]
    together = encoder.features(base.model, base.tokens(texts)).numpy()
    for position, text in enumerate(texts):
        batch = base.tokenizer([text], return_tensors="pt")
        hidden = base.model(**batch).last_hidden_state[0].detach().numpy()
        np.testing.assert_allclose(together[position], hidden.mean(axis=0), atol=2e-6)


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed(base, monkeypatch):
    from benchmarks.quality import encoder

    lengths = [3, 3, 4, 9, 9, 10, 30]
    order = list(range(len(lengths)))
    monkeypatch.setattr(encoder, "BATCH_TOKENS", 18)
    batches = [list(rows) for rows in encoder._batches(order, [[1] * length for length in lengths])]
    assert batches == [[0, 1, 2], [3, 4], [5], [6]]


def test_an_outcome_is_the_argmax_and_the_cross_entropy_of_each_row():
    import torch

    from benchmarks.quality import encoder

    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    found = encoder.outcome(scores, tasks.Rows(("a", "b"), (1, 0)))
    assert found.correct.tolist() == [True, False]
    np.testing.assert_allclose(found.nll, [math.log(4 / 3), math.log(4)], rtol=1e-6)
    assert found.mean_nll == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_a_linear_merge_adds_half_of_every_delta_to_the_base(base):
    from benchmarks.quality import merges

    folders = [ROOT / "examples" / "experts" / name for name in ("travel-desk", "kitchen-and-dining")]
    merged = merges.merged("linear", folders, base)
    name = "encoder.layer.3.attention.self.value"
    wanted = base.model.get_submodule(name).weight.detach().numpy().copy()
    for folder in folders:
        from safetensors.numpy import load_file

        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        wanted += 0.5 * config["lora_alpha"] / config["r"] * (B @ A)
    np.testing.assert_allclose(merged.get_submodule(name).weight.detach().numpy(), wanted, atol=1e-6)
    assert not np.array_equal(wanted, base.model.get_submodule(name).weight.detach().numpy())


def test_a_scaled_merge_adds_that_share_of_the_sum_of_deltas(base):
    from safetensors.numpy import load_file

    from benchmarks.quality import merges

    folder = ROOT / "examples" / "experts" / "kitchen-and-dining"
    name = "encoder.layer.3.attention.self.value"
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    untouched = base.model.get_submodule(name).weight.detach().numpy().copy()
    for method, times in (("task_arithmetic", 2), ("linear", 2), ("multislerp", 1)):
        found = merges.scaled(method, [folder, folder], base, scale=0.25).get_submodule(name).weight.detach().numpy()
        # The alpha is 16 at rank 4; a sum has two such experts, the mean on a sphere one.
        np.testing.assert_allclose(found, untouched + 0.25 * times * 4 * (B @ A), atol=1e-6, err_msg=method)


def test_the_first_rows_of_a_demo_are_spread_over_its_split():
    from benchmarks.quality import demos

    rows = tasks.Rows(tuple("abcdefg"), (0, 1, 2, 3, 4, 5, 6))
    demo = demos.Demo("x", Path(), ("l",), rows)
    assert demo.first(3).test == tasks.Rows(("a", "c", "e", "g"), (0, 2, 4, 6))
    assert demo.first(0).test == demo.first(9).test == rows


def test_methods_that_need_more_than_adapters_are_not_measured():
    from benchmarks import merge_quality

    names = {spec.name for spec in merge_quality.chosen(None)}
    assert {"linear", "ties", "knots", "opcm"} <= names
    assert not {"fisher", "regmean", "slerp", "lm_cocktail", "peft_ties"} & names
    with pytest.raises(ValueError, match="fisher"):
        merge_quality.chosen("linear,fisher")


def test_demo_experts_come_with_their_spelled_label_texts_and_only_their_rows(tmp_path):
    from benchmarks.quality import demos

    write_csv(tmp_path / "banking77_test.csv", [("a", "card_arrival"), ("b", "atm_support")])
    write_csv(tmp_path / "clinc150_test.csv", [("c", "mpg"), ("d", "translate"), ("e", "gas_type")])
    found = {demo.name: demo for demo in demos.read(tmp_path, ROOT / "examples")}
    assert found["banking-support"].label_texts == ("atm support", "card arrival")
    assert found["banking-support"].test == tasks.Rows(("a", "b"), (1, 0))
    car = found["car-and-commute"]
    assert car.folder == ROOT / "examples" / "experts" / "car-and-commute"
    assert car.test.texts == ("c", "e")
    assert [car.label_texts[label] for label in car.test.labels] == ["miles per gallon", "gas type"]


def test_a_demo_expert_is_judged_by_its_nearest_label_text_compressed_or_not(tmp_path, base):
    import peft
    import torch

    from benchmarks.quality import demos, laboratory
    from moerge import compression

    folder = ROOT / "examples" / "experts" / "kitchen-and-dining"
    labels = ("recipe", "calories", "how busy")
    rows = tasks.Rows(
        ("how do i bake rye bread", "is the diner packed now", "is cake fattening", "soup please"), (0, 2, 1, 0)
    )
    demo = demos.Demo("kitchen-and-dining", folder, labels, rows)
    (found,) = laboratory.Laboratory(base, tmp_path / "work", (0.2,)).demos([demo])
    assert (found.kind, found.task) == ("demo", "kitchen-and-dining")

    def judged(model):
        """Stock PEFT, one text at a time, the adapter beside its base."""
        vectors = []
        for text in (*rows.texts, *labels):
            with torch.inference_mode():
                hidden = model(**base.tokenizer([text], return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
        scores = torch.stack(vectors[:4]) @ torch.stack(vectors[4:]).T / 0.05
        return torch.nn.functional.cross_entropy(scores, torch.tensor(rows.labels), reduction="none").numpy()

    config = (folder / "adapter_config.json").read_bytes()
    by_label = {one.label: one.outcomes[0].nll for one in found.measured}
    assert list(by_label) == ["original", "no adapter", "paper, k = 20%", "default, k = 20%", "hq, k = 20%", "int4"]
    np.testing.assert_allclose(by_label["no adapter"], judged(base.model), atol=1e-4)
    np.testing.assert_allclose(
        by_label["original"], judged(peft.PeftModel.from_pretrained(base.fresh(), folder).eval()), atol=1e-4
    )
    for preset, label in (("default", "default, k = 20%"), ("paper", "paper, k = 20%"), ("int4", "int4")):
        weights = folder / "adapter_model.safetensors"
        options = {} if preset == "int4" else {"density": 0.2}
        report = compression.compress_adapter(config, weights, tmp_path / "small", preset=preset, **options)
        compression.decompress(tmp_path / "small", tmp_path / preset, config=config)
        model = peft.PeftModel.from_pretrained(base.fresh(), tmp_path / preset).eval()
        np.testing.assert_allclose(by_label[label], judged(model), atol=1e-4, err_msg=label)
        (measured,) = (one for one in found.measured if one.label == label)
        assert (measured.ratio, measured.cosine) == (report.ternary_ratio, report.product_cosine)
    assert len({values.tobytes() for values in by_label.values()}) == len(by_label)


def test_seeds_are_seen_one_after_another_and_every_variant_has_all_of_them(small_data, tmp_path, base, capsys):
    from benchmarks.quality import laboratory

    task = tasks.read(small_data, "sst2")
    here = laboratory.Laboratory(base, tmp_path, ())
    (found,) = here.experts(("ia3",), [task], seeds=(1, 2), rows=8)
    assert [one.label for one in found.measured] == ["original", "no adapter"]
    assert [len(one.outcomes) for one in found.measured] == [2, 2]
    first, second = found.original.outcomes
    assert not np.array_equal(first.nll, second.nll)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ia3")]
    assert [line.partition("seed ")[2] for line in told] == [
        "1: training", "1: original", "1: no adapter", "2: training", "2: original", "2: no adapter",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A sentiment task of 32 rows."""
    folder = tmp_path_factory.mktemp("data")
    words = {"positive": ("good", "fine", "lovely", "great"), "negative": ("bad", "poor", "dull", "awful")}
    rows = [
        (f"a {word} film with a {noun}", label) for label in words for word in words[label] for noun in ("plot", "cast")
    ]
    for split in ("train", "test"):
        write_csv(folder / f"sst2_{split}.csv", rows)
    return folder


def test_a_run_trains_compresses_measures_and_goes_on_where_it_was(small_data, tmp_path, capsys):
    given = ["compeft-quality", "--json", "--data", str(small_data), "--work", str(tmp_path), "--kinds", "lora",
             "--tasks", "sst2", "--seeds", "1", "--densities", "0.5", "--table", str(tmp_path / "table.md")]  # fmt: skip
    assert runner.main(given) == 0
    first = json.loads(capsys.readouterr().out)
    values = {row["name"]: row["value"] for row in first["rows"]}
    assert {name.split(": ")[0] for name in values} == {
        f"lora sst2, {variant}"
        for variant in ("original", "no adapter", "paper, k = 50%", "default, k = 50%", "hq, k = 50%", "int4")
    }
    assert 0 <= values["lora sst2, original: accuracy"] <= 100
    assert 9 < values["lora sst2, default, k = 50%: smaller than bf16"] < 12
    assert (tmp_path / "table.md").read_text().startswith("**lora, sst2** (16 rows, 1 seed)")
    (expert,) = (tmp_path / "experts" / "lora" / "sst2").iterdir()
    told = json.loads((expert / "training.json").read_text())
    assert (told["parameters"], told["seed"], told["kind"]) == (663_552, 1, "lora")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in {".npz", ".safetensors"}}
    assert runner.main(given) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_an_interrupted_training_is_done_again_and_a_seed_gives_the_same_expert(small_data, tmp_path, base):
    from safetensors.numpy import load_file

    from benchmarks.quality import training

    task = tasks.read(small_data, "sst2")
    plan = training.plan("ia3", "sst2", rows=8)
    folder = training.trained(base, task, plan, seed=1, folder=tmp_path)
    first = load_file(folder / "adapter_model.safetensors")
    assert sum(values.size for values in first.values()) == 16_128
    assert any(np.abs(values - 1).max() > 0 for values in first.values())
    (folder / "training.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    assert training.trained(base, task, plan, seed=1, folder=tmp_path) == folder
    again = load_file(folder / "adapter_model.safetensors")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = training.trained(base, task, plan, seed=2, folder=tmp_path)
    assert other != folder
    differing = load_file(other / "adapter_model.safetensors")
    assert any(not np.array_equal(first[name], differing[name]) for name in first)


def test_every_kind_is_measured_in_all_presets_and_lone_tensors_by_every_rule_too():
    from benchmarks.quality import variants

    labels = {
        kind: [variant.label for variant in variants.of_kind(kind, (0.05, 0.2))] for kind in compeft_quality.TRAINED
    }
    compared = ["original", "no adapter"]
    both = [f"{preset}, k = {k}%" for preset in ("paper", "default") for k in (5, 20)]
    assert labels["lora"] == compared + both + ["hq, k = 5%", "hq, k = 20%", "int4"]
    rules = [f"rule {rule}, k = {k}%" for rule in ("unbiased", "norm", "mse") for k in (5, 20)]
    assert labels["full"] == labels["ia3"] == compared + both + rules
